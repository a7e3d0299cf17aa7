"""The policy on one GPU: equal to the float64 reference, and to one CPU process."""

import dataclasses

import pytest
import torch

from megatron_srpo.plan.activations import stage_activations
from megatron_srpo.plan.architecture import read_architecture
from megatron_srpo.plan.layout import Layout
from megatron_srpo.plan.memory import persistent_lines
from tests.distributed import test_plan_memory, test_policy, test_routed_objective
from tests.distributed_harness import run_distributed
from tests.measured_memory import measured
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and `make test-gpu`"),
]


@pytest.mark.parametrize("layout", ["serial", "bf16"])
def test_a_routed_step_on_the_gpu_equals_float64(tmp_path_factory, layout):
    dtype = test_routed_objective.LAYOUTS[layout].dtype
    models = test_routed_objective.make_models(tmp_path_factory, "qwen3", dtype)
    test_routed_objective.check_layout(*models, layout, fresh=True)


def test_training_on_the_gpu_equals_training_on_a_cpu(tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=True, vocab=test_policy.VOCAB, layers=4)
    train = test_policy.train_and_report
    (found,) = run_distributed(train, 1, model, {}, tmp_path / "gpu", fresh=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (expected,) = run_distributed(train, 1, model, {}, tmp_path / "cpu", fresh=True)
    test_policy.check_close(found, expected)


def test_a_bf16_student_on_the_gpu_is_back_bit_for_bit(tmp_path):
    model = make_tiny_model(
        tmp_path / "model", "qwen3", tied=True, vocab=test_policy.VOCAB, layers=2, dtype=torch.bfloat16
    )
    run_distributed(test_policy.swap_bf16, 1, model, {}, fresh=True)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_predicted_memory_is_what_the_gpu_holds(tmp_path, recompute):
    sizes = test_plan_memory.SIZES
    model = make_tiny_model(tmp_path / "model", tied=False, dtype=torch.bfloat16, **sizes)
    settings = {"model": {"dtype": "bfloat16", "recompute": recompute}}
    (seen,) = run_distributed(measured, 1, model, settings, 4, 128, fresh=True)
    arch = read_architecture(str(model))[0]
    layout = dataclasses.replace(Layout(1), dtype_bytes=2, recompute=recompute)
    for line, size in persistent_lines(arch, layout, 0).items():
        assert seen[line] == pytest.approx(size, rel=0.05), line
    held, head = stage_activations(arch, layout, 0, 128, 4, path="gpu")
    assert seen["activations"] == pytest.approx(held + head, rel=0.15)
    assert seen["left"] == 0
