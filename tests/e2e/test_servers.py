"""Training with engines as servers: torchrun, two training ranks, vLLM servers beside them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_srpo.core.exit_codes import STOPPED
from megatron_srpo.rollout.vllm.environment import COMMON, CPU
from tests.e2e.test_training import CONFIG, REWARD, ROOT, torchrun
from tests.tiny_models import make_tiny_model

SERVERS = ("--rollout.placement=servers", "--rollout.num_servers=2", "--eval.every=0", "--checkpoint.every=0")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with model, data, reward and configuration of the tiny task."""
    folder = tmp_path_factory.mktemp("run")
    model = make_tiny_model(folder / "model", initializer_range=0.05)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "answer": "x", "kind": "digit"} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.format(out=folder / "out", model=model, data=folder / "data.jsonl", reward=folder / "reward.py")
    (folder / "config.toml").write_text(config)
    return folder


def train(prepared: Path, name: str, *overrides: str) -> list[dict]:
    """The log's lines of a run with two servers."""
    out = prepared / name
    result = torchrun("train", str(prepared / "config.toml"), f"--run.output_dir={out}", *SERVERS, *overrides)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def servers_of(prepared: Path) -> list[psutil.Process]:
    """Processes of servers of this run that still live."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(prepared) in argument for argument in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.mark.slow
def test_the_reward_rises_and_every_iteration_is_sampled_from_the_weights_that_it_trains(prepared):
    lines = train(prepared, "exact")
    rewards = [line["critic/score/mean"] for line in lines]
    assert len(rewards) == 16 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert [line["rollout/weight_version"] for line in lines] == list(range(16))
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines) < 1e-4
    assert servers_of(prepared) == []
    assert {path.name for path in (prepared / "exact" / "engines").iterdir()} == {"server-0.log", "server-1.log"}


@pytest.mark.slow
def test_one_batch_ahead_overlaps_with_the_training_and_is_one_publish_old(prepared):
    lines = train(prepared, "ahead", "--rollout.max_staleness=1")
    rewards = [line["critic/score/mean"] for line in lines]
    assert len(rewards) == 16 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert [line["rollout/weight_version"] for line in lines] == [0, *range(15)]
    assert [line["rollout/staleness_max"] for line in lines] == [0, *[1] * 15]
    assert all(line["rollout/stale_samples"] == 0 for line in lines)
    assert max(line["rollout/overlap_fraction"] for line in lines) > 0.2
    # The trainer has moved on, and the importance weights see it.
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines[1:]) > 1e-3


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_server_behind(prepared):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["megatron_srpo", "train", str(prepared / "config.toml"), f"--run.output_dir={prepared / 'killed'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        [*command, *SERVERS], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in run.stdout:  # the first iterations are there
        if " 2/16" in line:
            break
    servers = [process for process in servers_of(prepared) if "api_server" in " ".join(process.cmdline())]
    assert len(servers) >= 2
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children()]:  # torchrun, then the ranks
        process.kill()
    run.wait(30)
    assert psutil.wait_procs(servers, timeout=30)[1] == []
    assert servers_of(prepared) == []


@pytest.mark.slow
def test_a_run_uses_a_server_that_somebody_else_started(prepared, monkeypatch):
    monkeypatch.setenv("MEGATRON_SRPO_ENGINE_TOKEN", "a long random text")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megatron_srpo", "serve", str(prepared / "config.toml"), f"--port={port}"]
    bare = {name: value for name, value in os.environ.items() if name not in COMMON | CPU}  # as a user's is
    server = subprocess.Popen(command, cwd=ROOT, env={**bare, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        given = f'--rollout.servers=["http://127.0.0.1:{port}"]'
        lines = train(prepared, "given", given, "--run.iterations=3")
        assert [line["rollout/weight_version"] for line in lines] == [0, 1, 2]
        assert max(line["rollout_corr/logprob_diff_max"] for line in lines) < 1e-4
        assert server.poll() is None  # it is not the run's to end
        evaluate = ["eval", str(prepared / "config.toml"), f"--hf={prepared / 'model'}", "--split=train"]
        evaluate += ["--eval.temperature=1", "--eval.n_samples=8"]
        answers = torchrun(*evaluate, "--rollout.placement=servers", given)  # the server has another run's weights
        assert answers.returncode == 0, answers.stderr[-3000:]
        expected = torchrun(*evaluate)
        assert "eval/accuracy" in answers.stdout and answers.stdout == expected.stdout
        again = train(prepared, "again", given, "--run.iterations=2")
        assert max(line["rollout_corr/logprob_diff_max"] for line in again) < 1e-4
        assert again[0]["critic/score/mean"] == lines[0]["critic/score/mean"]
    finally:
        family = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        assert server.wait(60) == STOPPED and psutil.wait_procs(family, 20)[1] == []
