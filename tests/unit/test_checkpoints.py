"""Checkpoints of a run: complete or absent, verified, one run's only, and told when they cannot be written."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_srpo.checkpoints import find_latest, resolve, saving, whole
from megatron_srpo.checkpoints import folder as folder_module
from megatron_srpo.checkpoints.changes import changes, kind_of
from megatron_srpo.checkpoints.folder import best, damage, published, read_manifest
from megatron_srpo.checkpoints.saving import Checkpoints, LastCheckpointLost
from megatron_srpo.config import Config
from megatron_srpo.config.load import config_fields
from megatron_srpo.core.errors import ConfigError, UserError
from megatron_srpo.run import cli

ALONE = SimpleNamespace(  # the control channel of a world of one
    share=lambda compute: compute(), collect=lambda mine: [mine], any=bool, rank=0, world_size=1, is_driver=True
)


def config_of(folder, *, model="model", checkpoint=(), **sections) -> Config:
    return Config(
        run={"output_dir": str(folder), **sections.pop("run", {})}, model={"path": model},
        data={"train": "train.jsonl"}, checkpoint={"keep": 2, **dict(checkpoint)}, **sections,
    )  # fmt: skip


class Storage:
    """Stands for mcore.checkpoint: a policy is a list with one value, its file the value as text."""

    def __init__(self, error=None, kinds=("main", "teacher")):
        self.error, self.kinds = error, set(kinds)
        self.may_write = threading.Event()
        self.may_write.set()
        self.restored = []

    def snapshot(self, policy, folder):
        return Snapshot(self, policy[0], folder)

    def layout(self, policy):
        return {"world": 1}

    def needed(self, policy):
        return self.kinds

    def stored(self, folder):
        return set((folder / "weights").read_text().split()[1:])

    def load(self, policy, folder):
        policy[0] = (folder / "weights").read_text().split()[0]

    def load_generators(self, folder):
        self.restored.append(folder.name)
        return True


class Snapshot:
    def __init__(self, storage, value, folder):
        self.storage, self.value, self.folder = storage, value, folder
        self.results, self.files = [value], ["weights"]

    def write(self):
        self.storage.may_write.wait(60)
        if self.storage.error:
            raise self.storage.error
        (self.folder / "weights").write_text(" ".join([self.value, *sorted(self.storage.kinds)]))

    def write_index(self, results):
        assert results == [[self.value]]
        (self.folder / "index").write_text("x" * 1000)


def checkpoints(folder, storage=None, said=None, **options) -> Checkpoints:
    say = (lambda text: None) if said is None else said.append
    return Checkpoints(config_of(folder, **options), ALONE, storage or Storage(), say)


def saved(folder, *iterations, metrics=None, **options) -> Checkpoints:
    run = checkpoints(folder, **options)
    for iteration in iterations:
        run.save([f"weights{iteration}"], iteration, {"at": iteration}, (metrics or {}).get(iteration, {}), last=True)
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def restored(run):
    """What a resumed run has: its iteration, its state and its weights."""
    policy = ["fresh"]
    found = run.restore(policy)
    return found and (found.iteration, found.state, policy[0])


def test_the_newest_are_kept_and_the_last_is_known(tmp_path):
    run = saved(tmp_path, 1, 2, 3)
    assert names(tmp_path / "checkpoints") == ["latest", "step_00000002", "step_00000003"]
    assert run.last == find_latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000003"
    assert resolve(tmp_path) == resolve(run.last) == whole(run.last) == run.last
    assert (run.root / "latest").read_text() == "step_00000003\n"


def test_the_best_by_a_metric_is_kept_beside_the_newest(tmp_path):
    metrics = {n: {"eval/accuracy": value} for n, value in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.3))} | {5: {}}
    run = saved(tmp_path, 1, 2, 3, 4, 5, metrics=metrics, checkpoint={"keep_best": "eval/accuracy"})
    assert names(run.root) == ["latest", "step_00000002", "step_00000004", "step_00000005"]
    assert best(published(run.root), "-eval/accuracy").name == "step_00000004"
    assert best(published(run.root), "loss") is None


def test_a_run_goes_on_from_its_newest_checkpoint_with_all_its_state(tmp_path):
    saved(tmp_path, 1, 2)
    storage = Storage()
    run = checkpoints(tmp_path, storage)
    found = run.restore(policy := ["fresh"])
    assert (found.iteration, found.state, policy) == (2, {"at": 2}, ["weights2"])
    assert run.last.name == "step_00000002" and storage.restored == []
    found.restore_generators()
    assert storage.restored == ["step_00000002"]


# ---- asynchronous ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_of_the_instant_and_published_when_it_is_written(tmp_path):
    storage, policy = Storage(), ["before"]
    run = checkpoints(tmp_path, storage)
    storage.may_write.clear()
    run.save(policy, 1, {}, {})
    policy[0] = "after"
    run.poll()
    assert find_latest(run.root) is None and names(run.root) == ["writing_00000001"]
    storage.may_write.set()
    run.finish()
    assert restored(checkpoints(tmp_path)) == (1, {}, "before")


def test_a_checkpoint_is_finished_before_the_next_and_at_the_end(tmp_path):
    run = checkpoints(tmp_path)
    run.save(["a"], 1, {}, {})
    run.save(["b"], 2, {}, {})
    assert run.last.name == "step_00000001"
    run.save(["c"], 3, {}, {}, last=True)
    assert run.last.name == "step_00000003"
    run = checkpoints(tmp_path / "synchronous", checkpoint={"asynchronous": False})
    run.save(["a"], 1, {}, {})
    assert run.last.name == "step_00000001"


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "checkpoints/writing_00000002").mkdir()
    assert restored(checkpoints(tmp_path))[0] == 1
    assert names(tmp_path / "checkpoints") == ["latest", "step_00000001"]


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped bit": (flip, "checksum differs"),
    "a truncated file": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes"),
    "a missing file": (lambda file: file.unlink(), "No such file"),
}


@pytest.mark.parametrize("name", ["weights", "index", "run.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_found_told_and_the_one_before_is_used(tmp_path, kind, name):
    saved(tmp_path, 1, 2)
    newest, said = tmp_path / "checkpoints/step_00000002", []
    harm, words = DAMAGES[kind]
    harm(newest / name)
    assert restored(checkpoints(tmp_path, said=said)) == (1, {"at": 1}, "weights1")
    assert said[0].startswith(f"warning: checkpoint {newest} is damaged ({name}: ")
    assert words in said[0] or name == "manifest.json"
    assert names(tmp_path / "checkpoints") == ["damaged_step_00000002", "latest", "step_00000001"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(tmp_path):
    for folder in (saved(tmp_path, 1, 2).root).glob("step_*"):
        flip(folder / "weights")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole .*checkpoint.resume = false"):
        restored(checkpoints(tmp_path))


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["weights", "manifest.json", "checkpoints"])
def test_a_checkpoint_that_cannot_be_read_is_tried_again_then_refused_and_never_retired(
    tmp_path, monkeypatch, error, name
):
    root = saved(tmp_path, 1, 2).root
    waited, attempts, real = [], [], {"open": os.open, "listdir": os.listdir}
    monkeypatch.setattr(folder_module.time, "sleep", waited.append)

    def failing(call, path, *arguments):
        path = Path(path)
        if path.name == name and (path.parent.name == "step_00000002" or path == root):
            attempts.append(path)
            if len(attempts) <= failures:
                raise OSError(error, os.strerror(error), str(path))
        return real[call](path, *arguments)

    for call in real:
        monkeypatch.setattr(folder_module.os, call, partial(failing, call))
    failures = 99
    with pytest.raises(UserError, match=rf"cannot be read \({name}: {os.strerror(error)}\).*Nothing was changed"):
        restored(checkpoints(tmp_path))
    assert waited == [1.0, 5.0] and sorted(os.scandir(root), key=str)[-1].name == "step_00000002"
    attempts.clear()
    failures = 2
    assert restored(checkpoints(tmp_path))[0] == 2


def test_a_checkpoint_of_another_version_of_the_program_is_refused_and_never_retired(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    monkeypatch.setattr(folder_module, "FORMAT", 2)
    with pytest.raises(UserError, match="step_00000002 has format 1, this version of the program reads 2"):
        restored(checkpoints(tmp_path))
    assert names(tmp_path / "checkpoints") == ["latest", "step_00000001", "step_00000002"]


@pytest.mark.parametrize("name", ["weights", "manifest.json"])
def test_a_pipe_in_a_checkpoint_is_damage_and_nobody_waits_for_it(tmp_path, name):
    folder = saved(tmp_path, 1).last
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert damage(folder) == [f"{name}: it is no regular file"]


@pytest.mark.parametrize(
    "files", [None, [], {"../x": {"bytes": 1, "sha256": ""}}, {"weights": {}}, "nested", {"weights": 1}]
)
def test_a_manifest_with_foreign_content_is_damage_and_no_defect(tmp_path, files):
    folder = saved(tmp_path, 1).last
    manifest = {**read_manifest(folder), "files": files, "self": ""}
    manifest["self"] = folder_module._digest_of(manifest)
    text = "[" * 100_000 if files == "nested" else json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    assert damage(folder)[0].startswith("manifest.json: it ")


@pytest.mark.parametrize(
    ("name", "text"),
    [("run.json", "[]"), ("run.json", "[" * 100_000), ("config.json", "[]"), ("config.json", '{"run": 2}')],
    ids=["a list", "nested", "no configuration", "no sections"],
)
def test_state_that_somebody_else_wrote_with_right_checksums_is_one_message(tmp_path, name, text):
    folder = saved(tmp_path, 1).last
    (folder / name).write_text(text)
    manifest = read_manifest(folder)
    folder_module.write_manifest(
        folder, {key: manifest[key] for key in folder_module.Facts.__required_keys__},
        {file: folder_module.checksum(folder / file) for file in manifest["files"]},
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"{name} was not written by this program"):
        restored(checkpoints(tmp_path))


def test_ranks_divide_the_verification(tmp_path):
    folder = saved(tmp_path, 1).last
    for file in read_manifest(folder)["files"]:
        flip(folder / file)
    shares = [damage(folder, part, 3) for part in range(3)]
    assert (
        sorted(problem for share in shares for problem in share) == sorted(damage(folder))
        and len(damage(folder)) == 4
        and all(shares)
    )


# ---- another run, another configuration ------------------------------------------------------------------------------


def test_a_run_that_starts_anew_sets_an_earlier_ones_checkpoints_aside(tmp_path):
    for _ in range(2):
        saved(tmp_path, 70, 80)
        run = checkpoints(tmp_path, checkpoint={"resume": False})
        assert restored(run) is None and run.last is None
        run.save(["p"], 1, {}, {}, last=True)
        assert names(run.root) == ["latest", "step_00000001"]
    assert names(tmp_path) == ["begun_by", "checkpoints", "checkpoints.previous.1", "checkpoints.previous.2"]
    assert find_latest(tmp_path / "checkpoints.previous.1").name == "step_00000080"


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_goes_on_also_where_the_start_was_to_be_anew(tmp_path, monkeypatch, variable):
    run = checkpoints(tmp_path, checkpoint={"resume": False})
    assert restored(run) is None
    run.save(["p"], 1, {}, {}, last=True)
    monkeypatch.setenv(variable, "1")
    assert restored(checkpoints(tmp_path, checkpoint={"resume": False}))[0] == 1


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_of_a_run_that_had_not_begun_does_not_go_on_with_an_earlier_run(tmp_path, monkeypatch, variable):
    """Its first start was lost before it had set the earlier run's checkpoints aside."""
    saved(tmp_path, 70)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    restored(checkpoints(tmp_path, checkpoint={"resume": False}))  # of an earlier job, which began and saved nothing
    saved(tmp_path, 80)
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    monkeypatch.setenv(variable, "1")
    run = checkpoints(tmp_path, checkpoint={"resume": False})
    assert restored(run) is None
    run.save(["p"], 1, {}, {}, last=True)
    assert restored(checkpoints(tmp_path, checkpoint={"resume": False}))[0] == 1  # now it had begun


def test_a_first_run_has_nothing_to_set_aside(tmp_path):
    assert restored(checkpoints(tmp_path, checkpoint={"resume": False})) is None
    assert names(tmp_path) == ["begun_by"]


def test_another_runs_checkpoint_is_refused_with_what_differs(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        restored(checkpoints(tmp_path, model="other"))
    told = str(caught.value)
    assert "its model.path is model, this run's is other" in told and "checkpoint.resume = false" in told
    assert "algorithm" not in told
    with pytest.raises(UserError, match=r"its algorithm.name is srpo, this run's is grpo"):
        restored(checkpoints(tmp_path, algorithm={"name": "grpo"}))


def test_a_model_folder_that_moved_is_the_same_model(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    saved(tmp_path, 1, model=str(tmp_path / "here"))
    assert restored(checkpoints(tmp_path, model=str(tmp_path / "there")))[0] == 1


def test_what_may_change_does_and_the_difference_is_told(tmp_path):
    saved(tmp_path, 1)
    said = []
    run = checkpoints(
        tmp_path, said=said, optimizer={"lr": 0.5}, run={"iterations": 7, "name": "x"}, checkpoint={"keep": 3}
    )
    assert restored(run)[0] == 1
    assert said[1:] == ["  changed since: run.iterations: 100 → 7", "  changed since: optimizer.lr: 5e-06 → 0.5"]


@pytest.mark.parametrize(
    ("now", "reset"),
    [({"teacher": {"mode": "live"}}, "teacher"), ({"run": {"seed": 1}}, "data"), ({"data_shuffle": False}, "data")],
)
def test_a_configuration_that_resets_a_part_of_the_state_is_refused_unless_the_reset_is_named(tmp_path, now, reset):
    saved(tmp_path, 1)

    def run(**checkpoint):
        sections = {name: value for name, value in now.items() if name != "data_shuffle"}
        made = checkpoints(tmp_path, checkpoint=checkpoint, **sections)
        if "data_shuffle" in now:
            made._config = made._config.model_copy(
                update={"data": made._config.data.model_copy(update={"shuffle": False})}
            )
        return made

    with pytest.raises(UserError, match=rf"would reset a part of the state: .*\(reset {reset}\).*allow_reset"):
        restored(run())
    assert restored(run(allow_reset=[reset]))[0] == 1


@pytest.mark.parametrize(("kind", "reset"), [("exp_avg", "optimizer"), ("teacher", "teacher")])
def test_a_checkpoint_that_lacks_a_part_is_refused_unless_the_reset_is_named(tmp_path, kind, reset):
    saved(tmp_path, 1, storage=Storage(kinds={"main"}))
    needs = Storage(kinds={"main", kind})
    with pytest.raises(UserError, match=rf"it has no {kind} \(reset {reset}\)"):
        restored(checkpoints(tmp_path, needs))
    assert restored(checkpoints(tmp_path, needs, checkpoint={"allow_reset": [reset]}))[0] == 1


def test_missing_generators_are_refused_at_the_same_layout_and_told_at_another(tmp_path):
    saved(tmp_path, 1)
    storage, said = Storage(), []
    storage.load_generators = lambda folder: False
    with pytest.raises(UserError, match=r'allow_reset = \["rng"\]'):
        checkpoints(tmp_path, storage).restore(["x"]).restore_generators()
    checkpoints(tmp_path, storage, checkpoint={"allow_reset": ["rng"]}).restore(["x"]).restore_generators()
    storage.layout = lambda policy: {"world": 2}
    checkpoints(tmp_path, storage, said).restore(["x"]).restore_generators()
    assert "layout (world 1 → 2)" in said[-1] and "seeded again" in said[-1]


def test_another_data_order_is_refused_unless_its_reset_is_named(tmp_path):
    def refuse(state):
        raise ConfigError("the data set is another one")

    loader, said = SimpleNamespace(load_state_dict=refuse), []
    with pytest.raises(UserError, match=r'another one, or allow it: checkpoint.allow_reset = \["data"\]'):
        checkpoints(tmp_path).restore_data(loader, {})
    checkpoints(tmp_path, said=said, checkpoint={"allow_reset": ["data"]}).restore_data(loader, {})
    assert said[0].startswith("  the data starts from the beginning")


def test_every_key_has_a_class_and_only_these_are_not_free_to_change():
    kinds = {key: kind_of(key) for key in config_fields()}
    assert {key for key, kind in kinds.items() if kind in ("fixed", "reset")} == {
        "algorithm.name", "run.seed", "data.shuffle", "teacher.mode",
            "lora.rank", "lora.alpha", "lora.rslora", "lora.targets",
    }  # fmt: skip
    assert kinds["optimizer.lr"] == kinds["parallel.tensor_model_parallel_size"] == kinds["model.dtype"] == "told"
    assert kinds["observe.wandb"] == kinds["checkpoint.keep"] == kinds["run.name"] == "quiet"


def test_keys_that_only_one_version_of_the_program_has_are_no_difference():
    assert changes({"a": {"x": 1, "old": 2}, "gone": {}}, {"a": {"x": 1, "new": 3}, "added": {"y": 1}}) == []


def test_a_run_of_a_version_that_decayed_all_parameters_is_told_that_norms_and_biases_no_longer_decay():
    now = {"optimizer": {"lr": 1.0, "decay_norms_and_biases": False}}
    (change,) = changes({"optimizer": {"lr": 1.0}}, now)
    assert (str(change), change.kind) == ("optimizer.decay_norms_and_biases: True → False", "told")
    now["optimizer"]["decay_norms_and_biases"] = True
    assert changes({"optimizer": {"lr": 1.0}}, now) == []


# ---- a disk that takes nothing ---------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device", "x")


def test_a_full_disk_is_a_warning_training_goes_on_and_the_next_attempt_is_a_new_one(tmp_path):
    saved(tmp_path, 1)
    storage, said = Storage(FULL), []
    run = checkpoints(tmp_path, storage, said)
    run.restore(["x"])
    run.save(["two"], 2, {}, {})
    run.finish()
    before = tmp_path / "checkpoints/step_00000001"
    assert said[-1] == (
        f"warning: checkpoint {tmp_path}/checkpoints/step_00000002 could not be written: x: No space left on device. "
        f"Training goes on; the last checkpoint is still {before}. The next checkpoint is tried at its usual time"
    )
    assert names(run.root) == ["latest", "step_00000001"] and damage(before) == []
    storage.error = None
    run.save(["three"], 3, {}, {}, last=True)
    assert restored(checkpoints(tmp_path)) == (3, {}, "three")


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_names_the_one_that_is_left(tmp_path):
    saved(tmp_path, 1)
    run = checkpoints(tmp_path, Storage(FULL), checkpoint={"retry_minutes": 0})
    run.restore(["x"])
    with pytest.raises(LastCheckpointLost) as caught:
        run.save(["p"], 2, {}, {}, last=True)
    told = str(caught.value)
    assert "step_00000002 could not be written: x: No space left on device. Make room" in told
    assert f"goes on from {tmp_path / 'checkpoints/step_00000001'}" in told
    assert find_latest(run.root).name == "step_00000001"


def test_a_last_checkpoint_is_tried_until_the_disk_takes_it(tmp_path, monkeypatch):
    storage, said, waited = Storage(FULL), [], []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            storage.error = None

    monkeypatch.setattr(saving.time, "sleep", wait)
    run = checkpoints(tmp_path, storage, said)
    run.save(["p"], 2, {}, {}, last=True)
    assert waited == [10.0] * 3 and restored(checkpoints(tmp_path)) == (2, {}, "p")
    assert len(said) == 1 and "It is tried again for 10 minutes (checkpoint.retry_minutes). Make room" in said[0]


def test_a_copy_that_could_not_be_written_is_freed_although_its_error_is_part_of_a_cycle(tmp_path):
    copies = []

    class Cyclic(Storage):
        def snapshot(self, policy, folder):
            made = super().snapshot(policy, folder)
            copies.append(weakref.ref(made))
            made.write = partial(self.write, made)
            return made

        def write(self, copy):
            found = None  # as in Megatron's writer: the frame holds the error, whose traceback holds the frame
            try:
                raise OSError(errno.ENOSPC, "No space left on device", "x")
            except OSError as error:
                found = error
            raise found

    run = checkpoints(tmp_path, Cyclic(), checkpoint={"retry_minutes": 0})
    gc.disable()
    try:
        with pytest.raises(LastCheckpointLost):
            run.save(["p"], 2, {}, {}, last=True)
        assert copies[0]() is None
    finally:
        gc.enable()


def test_a_last_checkpoint_goes_to_the_other_folder_when_its_own_does_not_take_it(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    out.write_text("a file where the folder would be")
    run = checkpoints(out, checkpoint={"retry_minutes": 0, "fallback_dir": str(other)})
    with pytest.raises(UserError) as caught:
        run.save(["p"], 2, {}, {}, last=True)
    told, found = str(caught.value), Path(run._config.fallback_folder) / "step_00000002"
    assert found.parent.parent == other and found.parent.name.startswith("out-")
    assert "could not be written" in told and f"It is in {found} instead" in told and "Make the folder writable" in told
    assert not isinstance(caught.value, LastCheckpointLost) and whole(found) == found
    out.unlink()
    (out / "checkpoints").mkdir(parents=True)
    found.rename(out / "checkpoints/step_00000002")  # as the message says
    assert restored(checkpoints(out)) == (2, {}, "p")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_the_true_cause_is_named_and_no_room_is_asked_for(tmp_path, number):
    run = checkpoints(tmp_path, Storage(OSError(number, os.strerror(number), "x")), checkpoint={"retry_minutes": 0})
    with pytest.raises(LastCheckpointLost, match=rf"x: {os.strerror(number)}\. Make the folder writable"):
        run.save(["p"], 2, {}, {}, last=True)


def test_an_output_folder_that_is_deleted_during_a_write_is_a_warning(tmp_path):
    said, storage = [], Storage()
    run = checkpoints(tmp_path, storage, said)
    storage.may_write.clear()
    run.save(["p"], 1, {}, {})
    shutil.rmtree(run.root)
    storage.may_write.set()
    run.save(["q"], 2, {}, {}, last=True)
    assert "step_00000001 could not be written" in said[0] and "No such file or directory" in said[0]
    assert restored(checkpoints(tmp_path)) == (2, {}, "q")


def test_a_folder_that_cannot_be_made_is_a_warning_too(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("a file where the folder would be")
    said = []
    checkpoints(tmp_path, said=said).save(["p"], 1, {}, {})
    assert "could not be written" in said[0] and "still the beginning" in said[0]


def test_any_other_failure_to_write_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError):
        checkpoints(tmp_path, Storage(KeyError("x"))).save(["p"], 1, {}, {}, last=True)


def test_the_manifest_names_versions_layout_and_metrics(tmp_path):
    manifest = read_manifest(saved(tmp_path, 1, metrics={1: {"a": 0.5, "b": float("nan")}}).last)
    assert manifest["metrics"] == {"a": 0.5} and manifest["layout"] == {"world": 1}
    assert {"python", "torch", "megatron-core"} <= manifest["versions"].keys()
    assert sorted(manifest["files"]) == ["config.json", "index", "run.json", "weights"]
    assert json.loads((tmp_path / "checkpoints/step_00000001/config.json").read_text())["run"]["seed"] == 0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_marks_and_verifies(tmp_path, capsys):
    run = saved(tmp_path, 1, 2, metrics={1: {"m": 3.0}, 2: {"m": 1.0}})
    assert cli.main(["checkpoints", str(tmp_path), "--verify", "--best", "m"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step_00000001  0.0 MiB  20") and first.endswith("one rank  m 3  best m  whole")
    assert second.endswith("one rank  m 1  latest  whole")
    flip(run.last / "weights")
    assert cli.main(["checkpoints", str(run.root)]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert cli.main(["checkpoints", str(run.root), "--verify"]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[1].endswith("latest  damaged: weights: its checksum differs")
    assert told.err.startswith("1 of 2 damaged")


def test_the_command_prunes_but_spares_the_best(tmp_path, capsys):
    run = saved(tmp_path, 1, 2, 3, 4, metrics={2: {"m": 3.0}}, checkpoint={"keep": 4})
    assert cli.main(["checkpoints", str(tmp_path), "--prune", "1", "--best", "n"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err  # and nothing is removed
    assert cli.main(["checkpoints", str(tmp_path), "--prune", "1", "--best", "m"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["removed step_00000001", "removed step_00000003"]
    assert names(run.root) == ["latest", "step_00000002", "step_00000004"]


@pytest.mark.parametrize("options", [["--prune", "1"], ["--verify", "--prune", "1"]])
def test_the_command_never_removes_the_last_whole_checkpoint(tmp_path, capsys, options):
    run = saved(tmp_path, 1, 2, 3, checkpoint={"keep": 3})
    for number in (2, 3):
        flip(run.root / f"step_0000000{number}/weights")
    assert cli.main(["checkpoints", str(tmp_path), *options]) == 1
    assert names(run.root) == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    assert "removed" not in capsys.readouterr().out


def test_the_command_removes_nothing_while_a_checkpoint_cannot_be_read(tmp_path, capsys, monkeypatch):
    run = saved(tmp_path, 1, 2, 3, checkpoint={"keep": 3})
    monkeypatch.setattr(folder_module, "RETRY_AFTER_SECONDS", ())
    real = os.open

    def refuse(path, *arguments):
        if str(path) == str(run.last / "weights"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(folder_module.os, "open", refuse)
    assert cli.main(["checkpoints", str(tmp_path), "--prune", "1"]) == 2
    assert "cannot be read (weights: Input/output error)" in capsys.readouterr().err
    assert len(published(run.root)) == 3
    assert cli.main(["checkpoints", str(tmp_path), "--verify"]) == 1
    assert "unknown: checkpoint" in capsys.readouterr().out


def test_a_run_does_not_count_a_checkpoint_with_missing_bytes_among_those_it_keeps(tmp_path):
    run = saved(tmp_path, 1, 2)
    (run.last / "weights").write_bytes(b"")
    run.save(["p"], 3, {}, {}, last=True)
    assert names(run.root) == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    run.save(["p"], 4, {}, {}, last=True)
    assert names(run.root) == ["latest", "step_00000003", "step_00000004"]


def test_a_removal_that_was_killed_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    run = saved(tmp_path, 1, 2)
    monkeypatch.setattr(folder_module.shutil, "rmtree", lambda *unused, **unused_too: None)
    assert [folder.name for folder in folder_module.prune(run.root, 1)] == ["step_00000001"]
    assert published(run.root) == [run.last]
    monkeypatch.undo()
    assert restored(checkpoints(tmp_path))[0] == 2
    assert names(run.root) == ["latest", "step_00000002"]


def test_the_command_names_what_it_expected(tmp_path, capsys):
    assert cli.main(["checkpoints", str(tmp_path)]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
