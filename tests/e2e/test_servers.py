"""Training with engines as servers: torchrun, two training ranks, vLLM servers beside them."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_training import CONFIG, REWARD, torchrun
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
