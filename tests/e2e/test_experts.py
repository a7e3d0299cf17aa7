"""A mixture of experts trained by SRPO with expert parallelism 2, for real: torchrun, Megatron Core, vLLM, export."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.test_training import CONFIG, REWARD, metrics_of, torchrun
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
ITERATIONS = 3
PARALLEL = "tensor_model_parallel_size = 2\nsequence_parallel = true"
LAYOUTS = {  # what stands in its place, and the ranks of an engine
    "ep2": ("expert_model_parallel_size = 2", 1),
    "ep2 over tp2, engine over both": (PARALLEL + "\nexpert_model_parallel_size = 2", 2),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, tmp_path_factory):
    """A finished run whose experts are split over two ranks, which share the rest or hold copies of it."""
    folder = tmp_path_factory.mktemp("run")
    model = make_tiny_model(
        folder / "model", "qwen3_moe", tied=False, initializer_range=0.05, dense_layers=(0,), experts=6
    )
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "answer": "x", "kind": "digit"} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.format(out=folder / "out", model=model, data=folder / "data.jsonl", reward=folder / "reward.py")
    parallel, engine = LAYOUTS[request.param]
    config = config.replace(PARALLEL, parallel).replace("[rollout]", f"[rollout]\ntensor_parallel_size = {engine}")
    config = config.replace("iterations = 16", f"iterations = {ITERATIONS}")
    config = config.replace("[train]", "[train]\nmoe_aux_loss_coef = 0.001")
    (folder / "config.toml").write_text(config)
    result = torchrun("train", str(folder / "config.toml"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return folder


def test_engine_and_trainer_agree_on_every_token_of_every_iteration(run):
    lines = metrics_of(run)
    assert len(lines) == ITERATIONS and lines[-1]["actor/optimizer_steps"] == 2 * ITERATIONS
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines) < 1e-4


def test_the_routers_load_is_in_the_log(run):
    for line in metrics_of(run):
        assert 1 <= line["moe/load_max_over_mean"] <= line["moe/load_max_over_mean_max"] <= 3  # 6 experts, 2 a token
        assert line["moe/dropped_fraction"] == 0 and 0 <= line["moe/idle_experts"] < 1
        assert line["moe/balance_loss"] > 0


def test_the_export_loads_in_transformers_and_every_parameter_has_moved(run):
    exported = AutoModelForCausalLM.from_pretrained(run / "out" / "hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert all(not torch.equal(a, b) for a, b in zip(exported.parameters(), start.parameters(), strict=True))


def test_training_goes_on_from_the_checkpoint(run):
    result = torchrun("train", str(run / "config.toml"), "--run.iterations", str(ITERATIONS + 1))
    assert result.returncode == 0, result.stderr[-3000:]
    lines = metrics_of(run)
    assert len(lines) == ITERATIONS + 1
    assert lines[-1]["rollout_corr/logprob_diff_max"] < 1e-4
