"""The drivers of the examples: run folders, starting and stopping trainers, and what they report."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples.quickstart import run as quickstart
from examples.tiny import launch, runs
from examples.tiny.launch import Interrupted, Training, TrainingFailed, run_training, train_command
from examples.tiny.runs import open_run, place_inputs, request_of, shown_path
from examples.tiny.warm_start import WarmStart, warm_started_model
from examples.worksheet import compare, report
from examples.worksheet.task import Worksheet
from megatron_srpo.core import exit_codes

REQUEST = {"algorithm": "srpo", "seed": 0}


def script(text):
    return [sys.executable, "-c", text]


# ---- run folders


def test_a_new_run_gets_a_folder_with_its_request(tmp_path):
    assert open_run(tmp_path / "run", REQUEST) == ""
    assert runs.read_request(tmp_path / "run") == REQUEST


def test_the_same_request_continues_after_a_checkpoint(tmp_path):
    open_run(tmp_path / "run", REQUEST)
    (tmp_path / "run/checkpoints/step_00000020").mkdir(parents=True)
    assert "continuing" in open_run(tmp_path / "run", REQUEST)
    assert (tmp_path / "run/checkpoints/step_00000020").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_another_or_a_finished_run_is_moved_aside(tmp_path, finished):
    open_run(tmp_path / "run", REQUEST)
    (tmp_path / "run/checkpoints/step_00000020").mkdir(parents=True)
    if finished:
        (tmp_path / "run/summary.json").write_text("{}")
    asked = REQUEST if finished else {"algorithm": "grpo", "seed": 0}
    assert "run.previous.1" in open_run(tmp_path / "run", asked)
    assert (tmp_path / "run.previous.1/checkpoints/step_00000020").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["request.json"]


def test_a_run_that_never_reached_a_checkpoint_starts_over(tmp_path):
    open_run(tmp_path / "run", REQUEST)
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    assert open_run(tmp_path / "run", REQUEST) == ""
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run.previous.1").exists()


def test_a_folder_of_someone_else_is_never_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("…")
    with pytest.raises(ValueError, match=r"was not made by this example.*--output"):
        open_run(tmp_path / "run", REQUEST)
    assert (tmp_path / "run/thesis.tex").exists()


def test_requests_differ_by_the_content_of_the_configuration(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("a = 1")
    first = request_of(config, seed=0)
    assert request_of(config, seed=0) == first != request_of(config, seed=1)
    config.write_text("a = 2")
    assert request_of(config, seed=0) != first


def test_paths_inside_the_checkout_are_shown_relative_to_it(tmp_path):
    assert shown_path(tmp_path / "runs/x", tmp_path) == Path("runs/x")
    assert shown_path(Path("/elsewhere/x"), tmp_path) == Path("/elsewhere/x")


def test_inputs_follow_the_warm_start_they_were_made_from(tmp_path):
    tiny = WarmStart(64, 1, 2, 1, 32, steps=1, batch_size=2, lr=1e-3, warmup_steps=1, seed=0)
    model = warm_started_model(Worksheet(), tiny, tmp_path / "cache", report=lambda line: None)
    overrides = place_inputs(tmp_path / "run", model, Worksheet(), train=5, test=3)
    assert overrides["model.path"] == str(tmp_path / "run/warm_start")
    assert len(Path(overrides["data.train"]).read_text().splitlines()) == 5
    (tmp_path / "run/warm_start/warm_start.json").write_text("an older one")
    (tmp_path / "run/warm_start/model.safetensors").write_text("stale")
    place_inputs(tmp_path / "run", model, Worksheet(), train=5, test=3)
    assert (tmp_path / "run/warm_start/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


# ---- starting and stopping


def test_the_command_is_torchrun_on_loopback_with_dotted_overrides():
    command = train_command(Path("c.toml"), 2, {"run.seed": 3, "algorithm.name": "grpo"})
    assert command[:4] == [sys.executable, "-m", "megatron_srpo.torchrun", "--nproc-per-node=2"]
    assert "--master-addr=127.0.0.1" in command
    assert command[-8:] == ["-m", "megatron_srpo", "train", "c.toml", "--run.seed", "3", "--algorithm.name", "grpo"]


def test_a_failed_trainer_is_reported_with_its_log(tmp_path, capfd):
    text = """if True:
        import sys
        print("model.path: no such folder", file=sys.stderr)
        sys.exit(3)
    """
    log = tmp_path / "run/stderr.log"
    with pytest.raises(TrainingFailed, match=r"status 3.*stderr\.log"):
        run_training(script(text), log)
    shown = capfd.readouterr().err
    assert shown == "model.path: no such folder\n"
    assert log.read_text() == shown


def test_trainers_run_with_one_thread_a_rank_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log = tmp_path / "log"
    assert Training(script("import os; print(os.environ['OMP_NUM_THREADS'])"), log, quiet=True).wait() == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Training(script("import os; print(os.environ['OMP_NUM_THREADS'])"), log, quiet=True).wait() == 0
    assert log.read_text() == "1\n3\n"


def clean_stopper(fifo):
    """A trainer that says when it is ready, and stops cleanly when asked."""
    return script(f"""if True:
        import signal, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}})  # a handler can miss one before pause()
        open({str(fifo)!r}, "w").write("ready")
        signal.sigwait({{signal.SIGINT}})
        print("checkpoint written", flush=True)
        sys.exit(130)
    """)


def test_a_stop_waits_for_the_clean_end_of_the_trainer(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    training = Training(clean_stopper(tmp_path / "fifo"), tmp_path / "log", quiet=True)
    assert (tmp_path / "fifo").read_text() == "ready"
    assert training.status() is None
    training.stop()
    assert training.status() == 130 and (tmp_path / "log").read_text() == "checkpoint written\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_driver_stops_the_trainer_and_is_named_an_interruption(tmp_path, monkeypatch, number):
    os.mkfifo(tmp_path / "fifo")

    class SignalsItself(Training):
        def wait(self):
            if self.status() is None and (tmp_path / "fifo").exists():
                (tmp_path / "fifo").read_text()
                (tmp_path / "fifo").unlink()
                signal.raise_signal(number)
            return super().wait()

    monkeypatch.setattr(launch, "Training", SignalsItself)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_training(clean_stopper(tmp_path / "fifo"), tmp_path / "log")
    assert signal.getsignal(signal.SIGTERM) is before


# ---- the quickstart


def test_the_quickstart_passes_unknown_options_on_and_refuses_unknown_algorithms(capsys):
    options = quickstart.parse(["--algorithm", "mix", "--seed", "4", "--run.iterations", "3"])
    assert (options.algorithm, options.seed, options.extra) == ("mix", 4, ("--run.iterations", "3"))
    assert options.output == Path("runs/quickstart-mix")
    assert quickstart.parse([]).output == Path("runs/quickstart")
    with pytest.raises(SystemExit):
        quickstart.parse(["--algorithm", "ppo"])
    assert "srpo" in capsys.readouterr().err


@pytest.mark.parametrize("driver", [quickstart, compare])
@pytest.mark.parametrize(
    ("given", "cure"),
    [(["--run.output_dir", "elsewhere"], "--output DIR"), (["--model.path=elsewhere"], "trainer itself"),
     (["--run.seed", "5"], "--seed"), (["--algorithm.name=grpo"], "Use --")],
)  # fmt: skip
def test_what_a_driver_decides_is_not_passed_on(driver, given, cure, capsys):
    assert driver.main(given) == exit_codes.MISTAKE
    said = capsys.readouterr().err
    assert "is set by this command" in said and cure in said


def test_a_wrong_option_of_compare_is_told_before_the_warm_start(capsys):
    assert compare.main(["--run.iteratons", "3"]) == exit_codes.MISTAKE
    assert "iterations" in capsys.readouterr().err


def test_the_number_of_iterations_is_read_from_the_metrics(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "x": 1}\n{"step": 2}\n\n')
    assert quickstart.last_iteration(metrics) == 2


# ---- the comparison


def write_metrics(path, accuracy):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, report.ACCURACY: value, report.LENGTH: 21.0} for step, value in accuracy.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 7, "actor/grad_norm": 1.0}]))
    return path


def test_the_interval_is_students():
    mean, half = report.mean_and_interval([0.2, 0.4, 0.6])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.30 * 0.2 / math.sqrt(3))
    assert math.isnan(report.mean_and_interval([0.5])[1])


def test_the_table_has_a_row_a_method_and_only_steps_that_all_its_runs_have(tmp_path):
    made = {
        "grpo": [
            write_metrics(tmp_path / "a", {0: 0.1, 20: 0.3}),
            write_metrics(tmp_path / "b", {0: 0.1, 20: 0.5, 40: 0.9}),
        ],
        "srpo": [write_metrics(tmp_path / "c", {0: 0.1, 20: 0.4, 40: 0.8})],
    }
    assert set(report.summarize(made, report.ACCURACY)["grpo"]) == {0, 20}
    heading, _, grpo, srpo = report.markdown_table(made).splitlines()
    assert heading == "| method | seeds | step 0 | step 20 | step 40 | tokens at the end |"
    assert grpo == "| grpo | 2 | 0.10 ± 0.00 | 0.40 ± 1.27 |  | 21.00 ± 0.00 |"
    assert srpo == "| srpo | 1 | 0.10 | 0.40 | 0.80 | 21.00 |"


def test_the_comparison_is_drawn_over_iterations_hours_and_tokens(tmp_path):
    rows = [{"step": i, report.ACCURACY: i / 4, "timing_s/step": 2.0, "perf/total_tokens": 5e3} for i in range(4)]
    (tmp_path / "m").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = report.write_report({"srpo": [tmp_path / "m"], "grpo": []}, tmp_path)
    assert "| srpo | 1 |" in table
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {"compare.png", "compare_hours.png", "compare_tokens.png"}


class FakeTraining:
    """Ends at once; the status comes from the case's folder."""

    def __init__(self, case):
        self.log = case.folder / "log.txt"
        self._status = 1 if case.method == "sdpo" else 0
        write_metrics(case.folder / "metrics.jsonl", {0: 0.1, 20: 0.6})

    def status(self):
        return self._status


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "POLL_SECONDS", 0)
    monkeypatch.setattr(compare, "start", lambda case, inputs, extra: FakeTraining(case))
    monkeypatch.chdir(launch.ROOT)
    return compare.Options(("grpo", "sdpo"), seeds=2, jobs=2, output=tmp_path, extra=())


def test_one_failed_run_is_named_and_the_others_go_on(options, tmp_path, capsys):
    waiting = compare.unfinished(compare.cases_of(options), options, Path("model"))
    runner = compare.Runner(waiting, options, {}, Console(width=200))
    runner.run()
    assert [case.name for case in runner.failed] == ["sdpo seed 0", "sdpo seed 1"]
    said = capsys.readouterr().out
    assert "grpo seed 1: held-out accuracy 0.10 → 0.60" in said and "sdpo seed 0: failed with status 1" in said


def test_finished_runs_are_kept_until_something_about_them_changes(options):
    cases = compare.cases_of(options)
    compare.Runner(compare.unfinished(cases, options, Path("model")), options, {}, Console(quiet=True)).run()
    left = compare.unfinished(cases, options, Path("model"))
    assert [case.name for case in left] == ["sdpo seed 0", "sdpo seed 1"]
    assert len(compare.unfinished(cases, options, Path("another-model"))) == 4


def test_the_comparison_refuses_unknown_methods(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--methods", "grpo,ppo"])
    assert "unknown methods ['ppo']" in capsys.readouterr().err
