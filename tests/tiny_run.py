"""A whole training job that takes seconds: its folder, and starting it as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[1]
REWARD = """
def score(response, answer, metadata):
    return float(response[:1].isdigit())
"""
CONFIG = """
[run]
name = "tiny"
output_dir = "{folder}/out"
iterations = 8
[model]
path = "{folder}/model"
dtype = "float32"
[data]
train = "{folder}/data.jsonl"
max_prompt_length = 32
[rollout]
rollout_batch_size = 4
n_samples_per_prompt = 4
max_response_length = 4
enforce_eager = true
cpu_kv_cache_gib = 0.05
[algorithm]
distillation_topk = 8
[teacher]
template = "{{question}}{{solution}}"
solution_section = "; {{solution}}"
[reward]
workers = 1
[reward.functions]
digit = "{folder}/reward.py:score"
[optimizer]
lr = 3e-3
[train]
prompts_per_mini_batch = 2
max_tokens_per_gpu = 128
[checkpoint]
every = 4
[observe]
tensorboard = false
progress = "plain"
"""


def make_run(folder: Path, prompts: int = 10) -> Path:
    """Model, data, reward and configuration in `folder`; returns the configuration's path. The random model is rewarded
    for starting with a digit."""
    make_tiny_model(folder / "model", initializer_range=0.05, hidden=32, heads=2, kv_heads=2, ffn=64)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "answer": "x", "kind": "digit"} for i in range(prompts)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder / "config.toml"


def command(config: Path, *overrides: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
    """What a user types to train."""
    options = ["--standalone", f"--nproc-per-node={ranks}", *launcher]
    torchrun = [sys.executable, "-m", "megatron_srpo.torchrun", *options, "-m", "megatron_srpo"]
    return [*torchrun, "train", str(config), *overrides]


def start(*arguments: str | Path, **options) -> subprocess.Popen:
    """`command` started in a session of its own, its output in one pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    return subprocess.Popen(
        command(*arguments, **options), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """(exit code, everything it printed)."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def train(*arguments: str | Path, **options) -> str:
    """Run to the end, which must be a good one; returns the output."""
    code, output = finish(start(*arguments, **options))
    assert code == 0, output[-5000:]
    return output


def records(out: Path) -> list[dict]:
    """The iterations of metrics.jsonl, without what a clock or a machine decides on."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    unsteady = ("timing_s/", "perf/tokens_per_second", "perf/memory", "perf/tflops")
    return [{name: value for name, value in line.items() if not name.startswith(unsteady)} for line in lines]
