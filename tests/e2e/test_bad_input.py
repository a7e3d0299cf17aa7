"""Mistakes and interruptions for real, through the command: one clear message, no traceback, nothing left behind.

Ranks are started by megatron_srpo.torchrun, which takes torchrun's arguments; one test shows what torchrun itself adds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_srpo.config import load_config
from megatron_srpo.core import exit_codes
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
SERVERS = ("--rollout.placement", "servers")
QUIET, TORCHRUN = "megatron_srpo.torchrun", "torch.distributed.run"
CONFIG = """
[run]
output_dir = "{folder}/out"
iterations = 1000
[model]
path = "{folder}/model"
dtype = "float32"
[parallel]
tensor_model_parallel_size = 2
sequence_parallel = true
[data]
train = "{folder}/data.jsonl"
max_prompt_length = 32
[rollout]
rollout_batch_size = 2
n_samples_per_prompt = 4
max_response_length = 4
enforce_eager = true
cpu_kv_cache_gib = 0.25
[algorithm]
distillation_topk = 20
[reward]
workers = 1
functions = {{ digit = "{folder}/reward.py:score" }}
[optimizer]
lr = 1e-3
[train]
max_tokens_per_gpu = 256
[observe]
progress = "plain"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sound run that would take long: tiny model, data, configuration."""
    folder = tmp_path_factory.mktemp("bad_input")
    make_tiny_model(folder / "model", initializer_range=0.05)
    rows = [{"prompt": f"say {i}", "answer": "x", "kind": "digit"} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text("def score(response, answer, metadata):\n    return response[:1].isdigit()\n")
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))
    return folder


class Started:
    """A command that runs, in a session of its own as a terminal gives it; `said` are its lines so far."""

    def __init__(self, command: Sequence[str], *, limit: float = 240) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", *command], cwd=ROOT, env=environment, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said: list[str] = []
        self._family: list[psutil.Process] = []
        self._guard = threading.Timer(limit, self._process.kill)  # a hang fails the test instead of stopping the suite
        self._guard.start()

    def wait_for(self, mark: str) -> None:
        for line in self._process.stdout:
            self.said.append(line.rstrip("\n"))
            if mark in " ".join(line.split()):
                return
        pytest.fail(f"it ended before it said {mark!r}:\n" + "\n".join(self.said[-40:]))

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the foreground's process group, which torchrun's ranks are not in."""
        self._family = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGINT)

    def terminate(self) -> None:
        self._family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)

    def hang_up(self) -> None:
        """The terminal or the ssh connection is gone: its process group is signalled."""
        self._family = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGHUP)

    def end(self) -> int:
        """Read to the end; the exit code. Nothing that it had started may be left."""
        self.said += [line.rstrip("\n") for line in self._process.stdout]
        code = self._process.wait()
        self._guard.cancel()
        _, alive = psutil.wait_procs(self._family, timeout=20)
        assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
        return code

    def requeue(self) -> None:
        """SIGUSR1 to every process, as a cluster's manager signals a job step: launcher, ranks, and their helpers."""
        everyone = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        self._family = everyone[1:]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)

    @property
    def text(self) -> str:
        return "\n".join(self.said)


def ranks(*arguments: str, launcher: str = QUIET, port: Sequence[str] = ("--standalone",)) -> list[str]:
    return [launcher, *port, "--nproc-per-node=2", "-m", "megatron_srpo", *arguments]


def refused(*command: str) -> str:
    """What a command says that is refused: one message, exit code 2."""
    started = Started(command)
    assert started.end() == 2, started.text
    assert started.text.count("error") == 1 and "Traceback" not in started.text, started.text
    return started.text


def servers_of(model: Path) -> list[psutil.Process]:
    """Processes of servers, and of their watchers, with this model."""
    lines = [(process, process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [
        process for process, line in lines if any(word.endswith(str(model)) for word in line) and "vllm" in str(line)
    ]


# ---- refused before anything heavy starts ----------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_configuration_is_one_message_of_one_rank(folder):
    (folder / "rows.csv").write_text("prompt,answer\n")
    overrides = ["--rollout.top_p", "0.5", "--data.train", str(folder / "rows.csv"), "--model.path", str(folder)]
    told = refused(*ranks("train", str(folder / "run.toml"), *overrides))
    assert told.startswith("error: this configuration: 3 problems\n  rollout.top_p = 0.5:")
    assert "expected a .jsonl, .json or .parquet file" in told and "has no config.json" in told
    assert len(told.splitlines()) == 4
    assert not (folder / "out").exists()


def test_torchrun_itself_shows_the_message_in_its_report_too(folder):
    started = Started(ranks("train", str(folder / "run.toml"), "--run.iteration", "3", launcher=TORCHRUN))
    assert started.end() == 1  # torchrun's own
    ours, _, report = started.text.partition("FAILED")
    message = '--run.iteration "3": no such key; the nearest is run.iterations'
    assert ours.count(message) == 1 and report.count(message) == 1
    assert started.said[0].startswith("error: ")


def test_weights_cut_off_are_refused_by_their_header(folder):
    model = make_tiny_model(folder / "cut", initializer_range=0.05)
    weights = Path(model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    told = refused("megatron_srpo", "eval", str(folder / "run.toml"), "--hf", str(model), "--split", "train")
    assert "model.safetensors has" in told and "was not finished: run it again" in told


def test_a_port_in_use_is_told_with_the_cure(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = ["--master-addr=127.0.0.1", f"--master-port={taken.getsockname()[1]}"]
        told = refused(*ranks("train", str(folder / "run.toml"), port=port))
    assert "is in use" in told and "--master-port N" in told and len(told.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_told(folder):
    told = refused(*ranks("train", str(folder / "run.toml"), "--run.device", "cuda"))
    assert "run.device = 'cuda', but torch sees no GPU" in told and "megatron_srpo doctor" in told


def test_a_broken_row_is_told_with_file_and_line(folder):
    rows = (folder / "data.jsonl").read_text().splitlines()
    broken = folder / "broken.jsonl"
    broken.write_text("\n".join([rows[0], '{"prompt": "x", "answer": ', rows[1]]) + "\n")
    told = refused(*ranks("train", str(folder / "run.toml"), "--data.train", str(broken)))
    assert f"{broken}:2: not JSON: Expecting value at column 27." in told and 'data.on_bad_row = "skip"' in told


def test_servers_start_before_the_policy_is_loaded_and_end_if_that_fails(folder):
    model, out = Path(make_tiny_model(folder / "strange", initializer_range=0.05)), folder / "refused"
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.stranger": torch.zeros(1)}, model / "model.safetensors")  # vLLM meets it later
    options = ["--model.path", str(model), "--run.output_dir", str(out), *SERVERS]
    told = refused(*ranks("train", str(folder / "run.toml"), *options))
    started, error = told.index("engine servers are starting (1)"), told.index("error: ")
    assert started < error and "does not know, the first is 'model.stranger'" in told[error:]
    assert (out / "engines/server-0.log").read_text().startswith("---- start: http://127.0.0.1:")
    assert servers_of(model) == []


# ---- interrupted -----------------------------------------------------------------------------------------------------


def test_ctrl_c_during_the_start_ends_it_at_once_in_one_line(folder):
    run = Started(ranks("train", str(folder / "run.toml"), "--run.output_dir", str(folder / "early")))
    run.wait_for("data: 8 train prompts")
    run.interrupt()
    assert run.end() == 130
    assert "Traceback" not in run.text and "iteration 1" not in run.text
    assert run.text.count("stopped before the first iteration: there is nothing to save") == 1
    assert not (folder / "early/checkpoints").exists()


def test_ctrl_c_while_servers_start_leaves_none_of_them(folder):
    out = folder / "early_servers"
    run = Started(ranks("train", str(folder / "run.toml"), "--run.output_dir", str(out), *SERVERS))
    run.wait_for("engine servers are starting (1)")
    assert servers_of(folder / "model")
    run.interrupt()
    assert run.end() == 130
    assert "Traceback" not in run.text and "iteration 1" not in run.text
    assert servers_of(folder / "model") == []


def test_a_run_survives_a_log_that_cannot_be_written_and_stops_cleanly_at_ctrl_c(folder):
    """One run for all of it, because a start takes seconds: bad rows and long prompts counted, the log's disk gone,
    Ctrl-C, and another algorithm refused in the same folder."""
    out = folder / "run"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to(folder / "unmounted/metrics.jsonl")
    rows = (folder / "data.jsonl").read_text()
    long = json.dumps({"prompt": "9" * 100, "answer": "x", "kind": "digit"})
    (folder / "mixed.jsonl").write_text(f"{rows}{long}\n{{\n")
    overrides = ["--run.output_dir", str(out), "--data.train", str(folder / "mixed.jsonl"), "--data.on_bad_row", "skip"]
    command = ranks("train", str(folder / "run.toml"), *overrides)

    run = Started(command)
    run.wait_for("iteration 3/1000")
    run.interrupt()
    assert run.end() == 130
    assert "data: 8 train prompts (9 rows from 1 file, 1 bad row skipped:" in run.text
    assert "mixed.jsonl:10: not JSON" in run.text and "1 over length" in run.text
    assert run.text.count("cannot be written") == 1 and "training goes on" in run.text
    assert run.text.count("stopping: this iteration is finished and saved first") == 1
    last = sorted((out / "checkpoints").glob("step_*"))[-1]
    iteration = int(last.name.removeprefix("step_"))
    assert iteration >= 3
    assert f"stopped; last checkpoint: {last}" in "\n".join(run.said[-2:])
    assert "Traceback" not in run.text

    used = load_config(out / "config.toml")
    assert (used.data.train, used.data.on_bad_row) == (str(folder / "mixed.jsonl"), "skip")
    assert "is of another run" in refused(*command, "--algorithm.name", "grpo")
    assert load_config(out / "config.toml") == used  # the run's, not the refused command's


@pytest.mark.slow
def test_a_run_stops_cleanly_at_sigterm_sigusr1_and_sighup(folder):
    out = folder / "signalled"
    command = ranks("train", str(folder / "run.toml"), "--run.output_dir", str(out))

    run = Started([*command, "--checkpoint.every", "1"])
    run.wait_for("iteration 3/1000")  # it has saved: the writer's helper is in reach
    run.terminate()
    assert run.end() == 128 + signal.SIGTERM
    last = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert f"last checkpoint: {last}" in "\n".join(run.said[-2:])
    assert "Traceback" not in run.text

    requeued = Started(command)
    requeued.wait_for("data: 8 train prompts")  # the ranks load still
    requeued.requeue()
    assert requeued.end() == exit_codes.REQUEUE, requeued.text
    newest = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert int(newest.name[5:]) == int(last.name[5:]) + 1  # one iteration: the request had waited for the loop
    assert f"last checkpoint: {newest}" in "\n".join(requeued.said[-2:]) and "Traceback" not in requeued.text

    lost = Started(command)
    lost.wait_for(f"iteration {int(newest.name[5:]) + 1}/1000")
    for _ in range(2):  # of the kernel and of the shell
        lost.hang_up()
    assert lost.end() == exit_codes.STOPPED, lost.text
    saved = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert saved > newest and f"last checkpoint: {saved}" in "\n".join(lost.said[-2:])
