"""The policy on Transformer Engine's layers and fused Adam equals the one on Megatron's local layers and torch's Adam.

Transformer Engine's Python modules are real, its kernels are not: see tests/transformer_engine_on_cpu.py. The release
is fetched by pip once, into $MEGATRON_SRPO_TEST_CACHE or the user's cache folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_srpo.core.errors import UserError
from tests import transformer_engine_on_cpu as emulation
from tests.distributed import test_lora, test_lora_state
from tests.distributed import test_routed_objective as routed
from tests.distributed.test_lora import qwen3_moe  # noqa: F401  # a fixture
from tests.distributed.test_policy import LAYOUTS, VOCAB, check_close, swap_bf16, train_and_report
from tests.distributed_harness import run_distributed
from tests.lora_reference import make_adapter
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
EXPERT_LAYOUTS = {  # on two ranks
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2_sp_etp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="session")
def engine() -> Path:
    """The folder of Transformer Engine's sources."""
    cache = os.environ.get("MEGATRON_SRPO_TEST_CACHE") or Path.home() / ".cache/megatron_srpo/tests"
    try:
        return emulation.sources(Path(cache))
    except (RuntimeError, OSError) as error:
        pytest.skip(str(error))


def on_transformer_engine(engine: Path, function, *arguments):
    """Run on a rank that has just started. Returns the function's result and how often each stand-in was called."""
    emulation.install(engine)
    result = function(*arguments)
    return result, dict(emulation.CALLS)


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "qwen3_moe"])  # tied; untied with biases; experts
def local(request, tmp_path_factory):
    """A model, and what training it on the local layers gives."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = make_tiny_model(folder / "model", family, tied=family == "qwen3", vocab=VOCAB, layers=4)
    return family, model, run_distributed(train_and_report, 1, model, {}, folder / "checkpoint")[0], folder


def test_one_rank_trains_saves_and_resumes_with_the_fused_adam_as_without(engine, local, tmp_path):
    family, model, expected, folder = local
    arguments = (train_and_report, model, {}, tmp_path / "checkpoint", folder / "checkpoint")
    ((found, calls),) = run_distributed(on_transformer_engine, 1, engine, *arguments, fresh=True)
    check_close(found, expected)
    for ours, theirs in zip(found["before"], expected["before"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for name, value in expected["exported"].items():  # the local layers' checkpoint goes on in these layers
        torch.testing.assert_close(found["resharded"][name], value, rtol=0, atol=2e-5, msg=name)
        torch.testing.assert_close(
            found["resharded_teacher"][name], expected["teacher"][name], rtol=0, atol=1e-6, msg=name
        )
    wanted = {"adam", "rotary", "linear", "norm and linear", "norm", "attention"}
    if family == "qwen3_moe":
        wanted |= {"grouped", "permute"}
    assert wanted <= calls.keys() and calls["adam step"] == 4  # the fused Adam counts on from the checkpoint


SHARED = ["srpo", "srpo in two steps", "grpo"]


@pytest.mark.parametrize("layout", ["serial", "tp2 sp, recompute half", "tp2 sp pp2"])
def test_samples_share_their_prompts_and_the_routed_step_equals_float64(engine, tmp_path_factory, layout):
    student, teacher = routed.make_models(tmp_path_factory, "qwen3", "float32")
    groups_of = {variant: routed.make_groups(student, variant) for variant in SHARED}
    arguments = (routed.run_variants, SHARED, layout, student, teacher, groups_of)
    ranks = routed.LAYOUTS[layout].ranks
    found, calls = run_distributed(on_transformer_engine, ranks, engine, *arguments, fresh=True)[0]
    assert calls["attention behind prompts"]
    for variant in SHARED:
        samples = [sample for group in groups_of[variant] for sample in group]
        routed.check_steps(found[variant], samples, student, teacher, variant, layout)


def with_another_mask(student):
    """The policy on a machine whose kernel shows a response the wrong end of its prompt."""
    from megatron_srpo.bridge import load_hf_weights, read_config
    from megatron_srpo.mcore import groups, te_attention
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy

    config, path = routed.make_config(student, "srpo"), choose_device("auto", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=2)

    def make(load=lambda shards: load_hf_weights(shards, student)):
        return Policy(config, read_config(student), topology, path, load, total_steps=1)

    assert make().padding.shares
    te_attention.MASK = "padding_causal_bottom_right, shifted"
    with pytest.raises(UserError, match=r"off by .*Set train.share_prompts = false"):
        make()


def test_a_kernel_that_computes_shared_prompts_otherwise_is_noticed_at_the_start(engine, tmp_path_factory):
    student, _ = routed.make_models(tmp_path_factory, "qwen3", "float32")
    run_distributed(on_transformer_engine, 1, engine, with_another_mask, student, fresh=True)


@pytest.mark.parametrize("layout", sorted({**LAYOUTS, **EXPERT_LAYOUTS}))
def test_two_ranks_equal_the_local_layers(engine, local, layout, tmp_path):
    family, model, expected, folder = local
    layouts = EXPERT_LAYOUTS if family == "qwen3_moe" else LAYOUTS
    if layout not in layouts:
        pytest.skip("not a layout of this family")
    arguments = (train_and_report, model, layouts[layout], tmp_path / "checkpoint", folder / "checkpoint")
    for found, calls in run_distributed(on_transformer_engine, 2, engine, *arguments, fresh=True):
        check_close(found, expected)
        for name, value in expected["exported"].items():
            torch.testing.assert_close(found["resharded"][name], value, rtol=0, atol=2e-5, msg=name)
        assert calls["adam step"] == 4


@pytest.mark.parametrize("layout", ["tp2_sp", "dp2"])
def test_a_bf16_student_is_back_bit_for_bit(engine, tmp_path, layout):
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=True, vocab=VOCAB, layers=2, dtype=torch.bfloat16)
    run_distributed(on_transformer_engine, 2, engine, swap_bf16, model, LAYOUTS[layout], fresh=True)


@pytest.mark.parametrize("layout", ["serial", "tp2 sp", "tp2", "pp2 interleaved", "cp2"])
def test_adapters_on_transformer_engines_layers_equal_peft(engine, adapted, layout):
    model, adapter = adapted
    arguments = (test_lora.one_step, model, adapter, layout, test_lora.ALL, {})
    ranks = test_lora.LAYOUTS[layout][0]
    found, calls = run_distributed(on_transformer_engine, ranks, engine, *arguments, fresh=True)[0]
    test_lora.check_step(found, test_lora.reference_step(model, adapter), bound=1e-4)  # 5.4e-5 was seen
    assert {"norm and linear", "linear", "adam"} <= calls.keys()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model with biases, and an adapter on it."""
    folder = tmp_path_factory.mktemp("adapted")
    model = make_tiny_model(folder / "model", "qwen2", tied=False, vocab=VOCAB, layers=4)
    return model, make_adapter(model, folder / "adapter", targets=test_lora.ALL)


@pytest.mark.parametrize("layout", ["moe ep2", "moe tp2 sp", "moe etp2", "moe ep2 tp2 sp"])
def test_adapters_of_experts_on_transformer_engines_layers_equal_float64(engine, qwen3_moe, layout):  # noqa: F811
    """The experts' products are not grouped then."""
    model, adapter, tensors = qwen3_moe
    arguments = (test_lora.one_step, model, adapter, layout, test_lora.EVERYTHING, {})
    ranks = test_lora.LAYOUTS[layout][0]
    found, calls = run_distributed(on_transformer_engine, ranks, engine, *arguments, fresh=True)[0]
    test_lora.check_step(found, test_lora.chain_rule(model, tensors, 8 / 4))
    assert "grouped" not in calls and "permute" in calls


def test_adapters_on_transformer_engines_layers_are_kept(engine, adapted, tmp_path):
    """And a checkpoint of theirs is that of the local layers."""
    model, _ = adapted
    start = (test_lora_state.train_and_report, model)
    expected = run_distributed(*start[:1], 1, *start[1:], {}, tmp_path / "local", test_lora.ALL)[0]
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    arguments = (*start, parallel, tmp_path / "theirs", test_lora.ALL, tmp_path / "local")
    for found, _ in run_distributed(on_transformer_engine, 2, engine, *arguments, fresh=True):
        assert found["base"] == expected["base"] and test_lora_state.equal(found["drawn"], expected["drawn"])
        for name, value in expected["trained"].items():
            torch.testing.assert_close(found["resharded"][name], value, rtol=0, atol=2e-4, msg=name)
