"""The science job at its real shape but tiny: SmolLM2's odd head counts, two pipeline stages, the real questions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.slow
def test_two_pipeline_stages_train_on_the_real_questions_and_the_export_loads(tmp_path):
    model = make_tiny_model(
        tmp_path / "model", "llama", hidden=72, heads=9, kv_heads=3, head_dim=32, layers=4, max_positions=2048
    )
    overrides = {
        "model.path": model,
        "data.train": SHARED / "sciknoweval/chemistry_train.jsonl",
        "data.test": SHARED / "sciknoweval/chemistry_test.jsonl",
        "data.max_prompt_length": 900,  # a character is a token here
        "teacher.max_prompt_length": 1100,
        "train.max_tokens_per_gpu": 2048,
        "train.skip_zero_advantage": "false",  # a random model is never right
        "rollout.max_response_length": 12,
        "rollout.n_samples_per_prompt": 2,
        "rollout.cpu_kv_cache_gib": 0.25,
        "run.iterations": 2,
        "run.output_dir": tmp_path / "out",
        "observe.progress": "plain",
    }
    command = [sys.executable, "-m", "megatron_srpo.torchrun", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_srpo", "train", "examples/science/science_smollm2_cpu.toml"]
    command += [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(0 < line["rollout_corr/logprob_diff_max"] < 1e-4 for line in lines)
    assert all(line["forward/train_tokens"] > 1000 for line in lines)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert exported.config.num_attention_heads == 9
