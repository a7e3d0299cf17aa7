"""TensorBoard, W&B (offline) and the observer that owns them all."""

from __future__ import annotations

import json
import resource
import sys
from types import ModuleType

import pytest

from megatron_srpo.config import Config, DataConfig, ModelConfig, ObserveConfig, RolloutConfig, RunConfig
from megatron_srpo.config.schema import CheckpointConfig
from megatron_srpo.observe import Observer
from megatron_srpo.observe.trackers import Trackers, WeightsAndBiases
from tests.wandb_records import offline_steps


def config_of(folder, *, mismatch=0.05, **observe) -> Config:
    keys = {"tensorboard": False, "wandb": False, "progress": "plain"} | observe
    return Config(
        run=RunConfig(output_dir=str(folder), iterations=4),
        model=ModelConfig(path="model"),
        data=DataConfig(train="train.jsonl"),
        rollout=RolloutConfig(mismatch_warning=mismatch),
        observe=ObserveConfig(**keys),
    )


def events(folder):
    """Scalars of a TensorBoard folder as {name: [(step, value)]}, and the tags of texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars, read.Tags()["tensors"]


def test_tensorboard_gets_finite_numbers_and_the_configuration(tmp_path):
    trackers = Trackers(config_of(tmp_path, tensorboard=True), start_step=0, say=pytest.fail)
    trackers.log(1, {"a": 0.5, "nan": float("nan"), "word": "x", "n": 3})
    trackers.close()
    scalars, texts = events(tmp_path / "tensorboard")
    assert scalars == {"a": [(1, 0.5)], "n": [(1, 3.0)]}
    assert texts == ["config/text_summary"]


def test_tensorboard_forgets_the_steps_that_a_continued_run_repeats(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = Trackers(config_of(tmp_path, tensorboard=True), start_step=start, say=pytest.fail)
        for step in steps:
            trackers.log(step, {"a": float(start)})
        trackers.close()
    assert events(tmp_path / "tensorboard")[0]["a"] == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_wandb_runs_offline_and_a_continued_run_keeps_its_id_and_has_each_step_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # vLLM has it; W&B advertises to those who do
    ids = []
    for start, logged in ((0, (1, 2, 3)), (2, (3, 4)), (0, (1,))):
        observer = Observer(config_of(tmp_path, wandb=True, progress="off"), start_step=start)
        for step in logged:
            observer.log(step, {"a": 1.0, "x" * 40_000: float(start)})  # longer than a block of the file
        observer.close()
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1] != ids[2]
    assert offline_steps(tmp_path, ids[0]) == [1, 2, 3, 4]
    assert offline_steps(tmp_path, ids[2]) == [1]
    written = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert set(written) == {f"run-{ids[0]}.wandb", f"run-{ids[2]}.wandb"}
    assert capfd.readouterr() == ("", "")


def test_wandb_gets_the_steps_that_a_killed_run_had_not_handed_over(tmp_path):
    lines = [{"step": step, "a": step / 2, "bad": "NaN"} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "wandb_run_id").write_text("abc\n")
    trackers = Trackers(config_of(tmp_path, wandb=True), start_step=3, say=pytest.fail)
    trackers.log(4, {"a": 1.0})
    trackers.close()
    assert offline_steps(tmp_path, "abc") == [1, 2, 3, 4]


def test_a_resumed_run_without_metrics_keeps_what_wandb_has_recorded(tmp_path):
    earlier = tmp_path / "wandb/offline-run-1-abc"
    earlier.mkdir(parents=True)
    (tmp_path / "wandb_run_id").write_text("abc\n")
    Trackers(config_of(tmp_path, wandb=True), start_step=3, say=pytest.fail).close()
    assert earlier.is_dir()


def test_wandb_is_not_imported_unless_it_is_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise ImportError
    Trackers(config_of(tmp_path), start_step=0, say=pytest.fail).close()
    said = []
    Trackers(config_of(tmp_path, wandb=True), start_step=0, say=said.append).close()
    assert len(said) == 1 and "Weights & Biases is off" in said[0] and "training goes on" in said[0]


def test_a_tracker_that_breaks_is_switched_off_with_one_message(tmp_path, monkeypatch):
    said, calls = [], []

    class Broken:
        name = "Broken"

        def __init__(self, *arguments):
            pass

        def log(self, step, metrics):
            calls.append(step)
            raise RuntimeError("no route\nto host")

    monkeypatch.setattr("megatron_srpo.observe.trackers.TensorBoard", Broken)
    trackers = Trackers(config_of(tmp_path, tensorboard=True), start_step=0, say=said.append)
    trackers.log(1, {"a": 1.0})
    trackers.log(2, {"a": 1.0})
    trackers.close()
    assert calls == [1]
    assert said == ["Broken is off (RuntimeError: no route); training goes on: metrics.jsonl has everything"]


def test_tensorboard_on_a_full_disk_is_one_message_without_a_traceback(tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # its files may have no more bytes
    try:
        trackers = Trackers(config_of(tmp_path, tensorboard=True), start_step=0, say=said.append)
        for step in range(1, 4):
            trackers.log(step, {"a": 1.0})
        trackers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and said[0].startswith("TensorBoard is off (OSError")
    assert "Traceback" not in capfd.readouterr().err


def test_an_output_folder_that_is_a_file_does_not_stop_the_observer(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    observer = Observer(config_of(tmp_path / "run", tensorboard=True, wandb=True))
    observer.log(1, {"critic/score/mean": 0.5})
    observer.close()
    said = capsys.readouterr().out
    for part in ("metrics.jsonl: cannot be written", "TensorBoard is off", "Weights & Biases is off", "reward 0.500"):
        assert part in said


def test_the_observer_writes_every_record_and_continues_a_run(tmp_path):
    for start, steps in ((0, (0, 1, 2, 3)), (2, (3, 4))):
        observer = Observer(config_of(tmp_path, progress="off"), start_step=start)
        for step in steps:
            observer.log(step, {"start": start})
        observer.close()
        observer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["start"]) for row in rows] == [(0, 0), (1, 0), (2, 0), (3, 2), (4, 2)]


def test_a_mismatch_of_trainer_and_engine_is_told_when_it_begins_and_when_it_ends(tmp_path, capsys):
    observer = Observer(config_of(tmp_path, progress="off"))
    for step, value in enumerate((1e-6, 0.2, 0.3, float("nan"), 1e-6, 0.2), start=1):
        observer.log(step, {"rollout_corr/logprob_diff_mean": value})
    observer.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0].startswith("warning: iteration 2: trainer and rollout engine differ by 0.2 nats")
    assert "iteration 5: trainer and rollout engine agree again" in said[1]
    again = Observer(config_of(tmp_path, progress="off"), start_step=6)
    again.load_state_dict(observer.state_dict())
    again.log(7, {"rollout_corr/logprob_diff_mean": 0.3})  # a resumed run does not tell it again
    again.close()
    assert capsys.readouterr().out == ""
    observer = Observer(config_of(tmp_path, progress="off", mismatch=0))
    observer.log(1, {"rollout_corr/logprob_diff_mean": 9.0})
    observer.close()
    assert capsys.readouterr().out == ""


def test_a_correction_that_takes_a_part_of_the_loss_away_is_told_when_it_begins_and_when_it_ends(tmp_path, capsys):
    observer = Observer(config_of(tmp_path, progress="off"))
    for step, value in enumerate((1.0, 0.97, 0.5, 0.4, 0.99), start=1):
        observer.log(step, {"rollout_corr/weight": value})
    again = Observer(config_of(tmp_path, progress="off"), start_step=6)
    again.load_state_dict(observer.state_dict() | {"weight_warned": True})
    again.log(7, {"rollout_corr/weight": 0.3})  # a resumed run does not tell it again
    for one in (observer, again):
        one.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: iteration 3: algorithm.rollout_correction leaves a mean weight of 0.5")
    assert "iteration 5: the mean weight of the rollout correction is 0.99 again" in second


def test_teacher_prompts_that_do_not_fit_or_are_cut_are_told_when_they_are_more_than_a_few(tmp_path, capsys):
    observer = Observer(config_of(tmp_path, progress="off"))
    for name in ("unfit", "truncated"):
        for step, value in enumerate((0.0, 0.04, 1.0, 0.5, 0.02), start=1):
            observer.log(step, {f"srpo/teacher_prompt_{name}_fraction": value})
    observer.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert said[0].startswith("warning: iteration 3: 100% of the attempts that a teacher should have taught")
    assert said[2].startswith("warning: iteration 3: 100% of the teacher prompts were too long")
    assert "Raise teacher.max_prompt_length" in said[0] and "2% of the teacher prompts do not fit now" in said[1]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ("eval/acuracy", [": this run measures no such metric. The nearest known name is 'eval/accuracy'"]),
        ("-critic/score/mean", []),
    ],
)
def test_a_metric_of_the_best_checkpoint_that_is_not_measured_is_told_once(tmp_path, capsys, best, expected):
    config = config_of(tmp_path)
    observer = Observer(config.model_copy(update={"checkpoint": CheckpointConfig(every=2, keep_best=best)}))
    for step in (1, 2, 3, 4):
        observer.log(step, {"critic/score/mean": 0.5} | ({"eval/accuracy": 0.5} if step % 2 == 0 else {}))
    observer.close()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [f'warning: checkpoint.keep_best = "{best}"{text}' for text in expected] == [
        line.partition(". The best")[0] for line in told
    ]


def test_wandb_has_the_steps_as_its_axis():
    """W&B's own counter refuses steps that a continued run repeats, so "step" is a metric."""
    logged, defined = [], []

    class Run:
        def log(self, values):
            logged.append(values)

        def define_metric(self, name, **keys):
            defined.append((name, keys))

    tracker = object.__new__(WeightsAndBiases)
    tracker._run, tracker._recorded = Run(), 2
    tracker.log(2, {"a": 0.5})
    tracker.log(3, {"a": 1.0})
    assert logged == [{"step": 3, "a": 1.0}]
