"""Routing replay in whole runs of a mixture of experts: real Megatron Core, real vLLM, both placements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.routing_replay import CHOICES, GAP, TOKENS, compare
from tests.tiny_models import make_tiny_model
from tests.tiny_run import CONFIG, REWARD, records, train

pytestmark = pytest.mark.slow


def prepared(folder: Path, **model) -> Path:
    """A run's folder for a model with experts; returns the configuration."""
    make_tiny_model(folder / "model", "qwen3_moe", tied=False, experts_per_token=2, **model)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "answer": "x", "kind": "digit"} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder / "config.toml"


def test_replay_brings_trainer_and_engine_five_times_closer_in_bf16_over_fifty_iterations(tmp_path):
    """The experts of this random model matter much: weights of standard deviation 0.3, two of 64 experts a token."""
    config = prepared(tmp_path, dtype=torch.bfloat16, layers=4, experts=64, initializer_range=0.3)
    more = ("--model.dtype=bfloat16", "--rollout.max_response_length=16", "--optimizer.lr=1e-4",
            "--rollout.start_mismatch_limit=9")  # fmt: skip
    found = compare(config, tmp_path, iterations=50, modes=("off", "rollout"), more=more)
    print(json.dumps(found, indent=1))
    assert found["off"][GAP] >= 5 * found["rollout"][GAP], found
    assert 0.01 < found["rollout"][CHOICES] < found["rollout"][TOKENS] < 1


LAYOUTS = {  # options of a run on two ranks
    "ep2": ("--parallel.expert_model_parallel_size=2",),
    "pp2, engine over both": ("--parallel.pipeline_model_parallel_size=2", "--rollout.tensor_parallel_size=2"),
    "servers": ("--rollout.placement=servers", "--rollout.num_servers=2", "--parallel.expert_model_parallel_size=2"),
    "a server of two workers, ahead": (
        "--rollout.placement=servers", "--rollout.tensor_parallel_size=2", "--rollout.max_staleness=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_placement_returns_the_experts_that_the_trainer_would_choose_in_float32(layout, tmp_path):
    config = prepared(tmp_path, layers=4, experts=6, initializer_range=0.05, dense_layers=(1,))
    output = train(config, *LAYOUTS[layout], "--run.iterations=3", "--checkpoint.every=0", ranks=2)
    assert "the trainer uses the experts that the rollout engine chose" in output and "6 bytes per token" in output
    lines = records(tmp_path / "out")
    assert len(lines) == 3
    for line in lines[:1] if "ahead" in layout else lines:  # later ones come from older weights
        assert line[TOKENS] < 0.02 and line["rollout_corr/logprob_diff_max"] < 1e-4
    assert lines[-1][CHOICES] > 0.1  # the second optimizer step of an iteration is another policy


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path):
    config = prepared(tmp_path, layers=4, experts=6, initializer_range=0.05, dtype=torch.bfloat16)
    options = ("--model.dtype=bfloat16", "--checkpoint.every=2", "--rollout.start_mismatch_limit=9")
    train(config, *options, "--run.iterations=4")
    straight = records(tmp_path / "out")
    for iterations in (2, 4):
        train(config, *options, f"--run.iterations={iterations}", f"--run.output_dir={tmp_path / 'again'}")
    assert records(tmp_path / "again") == straight
    assert [line["step"] for line in straight] == [1, 2, 3, 4] and all(TOKENS in line for line in straight)
    shards = [sorted((tmp_path / out).glob("checkpoints/*4/**/*.distcp")) for out in ("out", "again")]
    assert [a.read_bytes() for a in shards[0]] == [b.read_bytes() for b in shards[1]] and shards[0]
