"""The main job for real: torchrun, Megatron Core with TP 2 and sequence parallelism, vLLM engines, reward, export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_srpo.checkpoints.folder import find_latest, read_manifest
from tests.tiny_models import make_tiny_model
from tests.tiny_run import records

ROOT = Path(__file__).parents[2]
REWARD = """
def score(response, answer, metadata):
    return float(response[:1].isdigit())
"""
CONFIG = """
[run]
name = "e2e"
output_dir = "{out}"
iterations = 16
[model]
path = "{model}"
dtype = "float32"
[parallel]
tensor_model_parallel_size = 2
sequence_parallel = true
[data]
train = "{data}"
test = "{data}"
max_prompt_length = 32
[rollout]
rollout_batch_size = 8
n_samples_per_prompt = 8
max_response_length = 4
enforce_eager = true
cpu_kv_cache_gib = 0.25
[algorithm]
distillation_topk = 20
[teacher]
template = "{{question}}{{solution}}"
solution_section = "; {{solution}}"
[reward.functions]
digit = "{reward}:score"
[optimizer]
lr = 3e-3
weight_decay = 0.0
[train]
prompts_per_mini_batch = 4
max_tokens_per_gpu = 256
[checkpoint]
every = 8
[eval]
every = 8
max_prompts = 8
[observe]
wandb = false
progress = "plain"
"""


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, "-m", "megatron_srpo", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on a random tiny model that is rewarded for starting with a digit."""
    folder = tmp_path_factory.mktemp("run")
    model = make_tiny_model(folder / "model", initializer_range=0.05)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "answer": "x", "kind": "digit"} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.format(out=folder / "out", model=model, data=folder / "data.jsonl", reward=folder / "reward.py")
    (folder / "config.toml").write_text(config)
    result = torchrun("train", str(folder / "config.toml"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return folder


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "critic/score/mean" in line]


def test_the_reward_rises(run):
    rewards = [line["critic/score/mean"] for line in metrics_of(run)]
    assert len(rewards) == 16
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


def test_both_branches_were_used_and_the_teacher_was_asked(run):
    lines = metrics_of(run)
    assert max(line["srpo/sdpo_fraction"] for line in lines) > 0.1
    assert any(line.get("srpo/teacher_entropy", 0) > 0 for line in lines)
    assert lines[-1]["actor/optimizer_steps"] == 32


def test_engine_and_trainer_agree_on_every_token_of_every_iteration(run):
    assert max(line["rollout_corr/logprob_diff_max"] for line in metrics_of(run)) < 1e-4


def test_the_export_loads_in_transformers_and_holds_what_the_checkpoint_holds(run):
    exported = AutoModelForCausalLM.from_pretrained(run / "out" / "hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(exported.parameters(), start.parameters(), strict=True)]
    assert all(moved)

    def accuracy(*source: str) -> float:
        result = torchrun("eval", str(run / "config.toml"), *source, "--eval.max_prompts=8")  # as in the training
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout[result.stdout.index("{") :])["eval/accuracy"]

    by_export = accuracy("--hf", str(run / "out" / "hf"))
    by_checkpoint = accuracy("--checkpoint", str(run / "out"))
    assert by_export == by_checkpoint
    assert by_export == metrics_of(run)[-1]["eval/accuracy"]

    accuracy("--hf", str(run / "out" / "hf"), "--as-teacher", "--data.solution_key", "answer")
    plain, taught = (_responses(run / "out" / "eval" / name) for name in ("test.jsonl", "test-taught.jsonl"))
    assert plain.keys() == taught.keys() and plain != taught  # the same questions, with more to read


def _responses(file: Path) -> dict[str, list[str]]:
    return {row["uid"]: row["responses"] for row in map(json.loads, file.read_text().splitlines())}


def test_a_run_that_goes_on_from_a_checkpoint_equals_the_straight_one_bit_for_bit(run, tmp_path):
    """As if every process had been killed between the two checkpoints; epochs end in between."""
    shutil.copytree(run / "out", tmp_path / "out", ignore=shutil.ignore_patterns("step_00000016", "hf"))
    result = torchrun("train", str(run / "config.toml"), "--run.output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "going on from" in result.stdout and "changed since" not in result.stdout
    assert records(tmp_path / "out") == records(run / "out")
    exported = [(folder / "out" / "hf" / "model.safetensors").read_bytes() for folder in (run, tmp_path)]
    assert exported[0] == exported[1]
    kept = [read_manifest(find_latest(folder / "out" / "checkpoints")) for folder in (run, tmp_path)]
    assert kept[0]["iteration"] == 16 and shards(kept[0]) == shards(kept[1])


def shards(manifest: dict) -> dict[str, str]:
    """Checksums of everything that training goes on from: weights, moments, teacher, generators, data position."""
    names = [name for name in manifest["files"] if name.endswith((".distcp", ".pt")) or name == "run.json"]
    assert len(names) >= 6  # of two ranks
    return {name: manifest["files"][name]["sha256"] for name in names}


def test_a_users_mistake_is_one_message_without_a_traceback(run):
    command = [
        sys.executable,
        "-m",
        "megatron_srpo",
        "train",
        str(run / "config.toml"),
        "--rollout.n_sample_per_prompt=4",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2
    assert "n_samples_per_prompt" in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
