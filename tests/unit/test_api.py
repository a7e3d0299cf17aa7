"""The Python API does what the commands do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_srpo import api
from megatron_srpo.config import load_config
from megatron_srpo.core.errors import ConfigError, UserError
from megatron_srpo.run import launch
from tests.tiny_models import make_tiny_model


@pytest.fixture
def run_file(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b", "kind": "exact"}) + "\n")
    file = tmp_path / "run.toml"
    file.write_text(
        f'[run]\noutput_dir = "{tmp_path}/out"\n[model]\npath = "{model}"\n'
        f'[data]\ntrain = "{tmp_path}/train.jsonl"\ntest = "{tmp_path}/test.jsonl"\nmax_prompt_length = 32\n'
        "[rollout]\nmax_response_length = 16\n"
    )
    return file


def test_a_configuration_is_loaded_with_changes_and_mistakes_are_raised(run_file):
    config = api.load(run_file, {"optimizer.lr": 1e-4, "run.name": "17", "reward.functions": {"a": "b.py:c"}})
    assert (config.optimizer.lr, config.run.name, config.reward.functions) == (1e-4, "17", {"a": "b.py:c"})
    with pytest.raises(ConfigError, match=r"the nearest is optimizer\.lr"):
        api.load(run_file, {"optimizer.learning_rate": 1})


def test_ranks_get_the_configuration_as_it_is(run_file, monkeypatch):
    started = []

    popen = subprocess.Popen

    def start(command):
        started.append((command, load_config(command[-1])))
        return popen([sys.executable, "-c", "raise SystemExit(75)"])

    monkeypatch.setattr(subprocess, "Popen", start)
    config = api.load(run_file, {"run.seed": 3})
    assert api.spawn(config, ranks=2) == 75
    ((command, given),) = started
    assert given == config
    assert command[:7] == [
        sys.executable,
        "-m",
        "megatron_srpo.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]


def test_ctrl_c_waits_for_the_ranks_which_save_a_checkpoint(run_file, tmp_path):
    """A program of the user in a process group of its own, as a terminal has it. In the launcher's place is a program
    that needs two seconds to stop."""
    launcher = (
        "import pathlib, signal, time\n"
        "def stop(*_): time.sleep(2); pathlib.Path('saved').touch(); raise SystemExit(130)\n"
        "signal.signal(signal.SIGINT, stop); pathlib.Path('started').touch(); time.sleep(60)\n"
    )
    program = (
        "import subprocess, sys\nfrom megatron_srpo import api\npopen = subprocess.Popen\n"
        f"subprocess.Popen = lambda command: popen([sys.executable, '-c', {launcher!r}])\n"
        f"api.spawn(api.load({str(run_file)!r}), ranks=1)\n"
    )
    user = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0,
        env={**os.environ, "PYTHONPATH": str(Path(api.__file__).parents[1])},
    )  # fmt: skip
    while user.poll() is None and not (tmp_path / "started").exists():
        time.sleep(0.05)
    os.killpg(user.pid, signal.SIGINT)
    _, told = user.communicate(timeout=60)
    assert (tmp_path / "saved").exists() and told.rstrip().endswith("KeyboardInterrupt")


def test_training_and_evaluation_in_this_process_check_the_configuration_first(run_file, monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "train", lambda config, lock: calls.append(config) or 0)
    monkeypatch.setattr(launch, "measure", lambda config, **options: calls.append(options) or {"eval/accuracy": 1.0})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    config = api.load(run_file)
    assert api.train(config) == 0 and calls == [config]
    assert api.evaluate(config, checkpoint="runs/x") == {"eval/accuracy": 1.0}
    assert str(calls[1]["checkpoint"]) == "runs/x" and calls[1]["responses"].name == "test.jsonl"
    with pytest.raises(UserError, match=r"set data\.solution_key"):
        api.evaluate(config, as_teacher=True)
    api.evaluate(api.load(run_file, {"data.solution_key": "worked"}), as_teacher=True)
    assert calls[2]["taught"] and calls[2]["responses"].name == "test-taught.jsonl"
    with pytest.raises(ConfigError, match=r"parallel.tensor_model_parallel_size|one copy of the model"):
        api.train(api.load(run_file, {"parallel.tensor_model_parallel_size": 2}))


def test_the_metrics_of_a_run_are_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "actor/loss": 0.5}\n{"step": 2, "actor/loss": 0.25}\n{"st')
    assert [row["actor/loss"] for row in api.metrics(tmp_path)] == [0.5, 0.25]
    with pytest.raises(UserError, match="expected the output folder of a run"):
        api.metrics(tmp_path / "absent")
