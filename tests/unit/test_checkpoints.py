"""Checkpoint folders of a run: complete or absent, one run's only, and told when they cannot be written."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_srpo.checkpoints import Checkpoints, find_latest, resolve
from megatron_srpo.config import CheckpointConfig, Config, DataConfig, ModelConfig, RunConfig, UserError

ALONE = SimpleNamespace(share=lambda compute: compute())  # the control channel of a world of one


def config_of(folder, *, model="model", resume=True) -> Config:
    return Config(
        run=RunConfig(output_dir=str(folder)),
        model=ModelConfig(path=model),
        data=DataConfig(train="train.jsonl"),
        checkpoint=CheckpointConfig(keep=2, resume=resume),
    )


def write(policy, folder, extra):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"{policy} {extra['iteration']}")


def read(policy, folder):
    return {"policy": policy, "read": (folder / "weights").read_text()}


def checkpoints(folder, *, write=write, **options) -> Checkpoints:
    return Checkpoints(config_of(folder, **options), ALONE, write, read)


def saved(folder, *iterations) -> Checkpoints:
    run = checkpoints(folder)
    for iteration in iterations:
        run.save("p", iteration, {})
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_last_is_known(tmp_path):
    run = saved(tmp_path, 1, 2, 3)
    assert names(tmp_path / "checkpoints") == ["latest", "step_00000002", "step_00000003"]
    assert run.last == find_latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000003"
    assert resolve(tmp_path) == resolve(run.last) == run.last


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path):
    saved(tmp_path, 1, 2)
    run = checkpoints(tmp_path)
    assert run.restore("q") == {"policy": "q", "read": "p 2"}
    assert run.last.name == "step_00000002"


def test_a_run_that_starts_anew_sets_an_earlier_ones_checkpoints_aside(tmp_path):
    for _ in range(2):
        saved(tmp_path, 70, 80)
        run = checkpoints(tmp_path, resume=False)
        assert run.restore("q") is None and run.last is None
        run.save("p", 1, {})
        assert names(run.root) == ["latest", "step_00000001"]
    assert names(tmp_path) == ["checkpoints", "checkpoints.previous.1", "checkpoints.previous.2"]
    assert find_latest(tmp_path / "checkpoints.previous.1").name == "step_00000080"


def test_a_first_run_has_nothing_to_set_aside(tmp_path):
    assert checkpoints(tmp_path, resume=False).restore("q") is None
    assert names(tmp_path) == []


def test_another_runs_checkpoint_is_refused_with_what_differs(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        checkpoints(tmp_path, model="other").restore("q")
    told = str(caught.value)
    assert "its model.path is model, this run's is other" in told and "checkpoint.resume = false" in told
    assert "algorithm" not in told


def failing(error):
    def write(policy, folder, extra):
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device"),
        (CheckpointException("write", {0: (OSError(errno.ENOSPC, "No space left on device"), None)}), "No space left"),
        (CheckpointException("write", {}), "the driver knows why"),  # as the other ranks see it
    ],
)
def test_a_full_disk_is_told_with_the_checkpoint_that_is_left(tmp_path, error, reason):
    saved(tmp_path, 1)
    run = checkpoints(tmp_path, write=failing(error))
    run.restore("q")
    with pytest.raises(UserError) as caught:
        run.save("p", 2, {})
    told = str(caught.value)
    assert "step_00000002 could not be written" in told and reason in told
    assert f"goes on from {tmp_path / 'checkpoints/step_00000001'}" in told
    assert find_latest(run.root).name == "step_00000001"


def test_any_other_failure_to_write_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError):
        checkpoints(tmp_path, write=failing(KeyError("x"))).save("p", 1, {})
    with pytest.raises(RuntimeError, match="shapes differ"):  # not the BaseException that nobody expects
        failures = {0: (ValueError("shapes differ"), None)}
        checkpoints(tmp_path, write=failing(CheckpointException("write", failures))).save("p", 1, {})
