"""LoRA on real ranks against transformers with peft in float64: loss and the gradient of every factor, in every
layout."""

import itertools
from pathlib import Path

import pytest
import torch

from tests.distributed.test_policy import VOCAB, _rows, logprobs
from tests.distributed_harness import run_distributed
from tests.lora_reference import adapter_tensors, load_adapted, make_adapter
from tests.routed_reference import hub_names, load, put_weights
from tests.tiny_models import make_tiny_model

ALL = ["attention", "mlp"]
LAYOUTS = {
    "serial": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 interleaved": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, {}),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True}),
    "cp2 tp2 sp": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2 sp pp2": (
        4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "tp2 dp2": (4, {"tensor_model_parallel_size": 2, "overlap_grad_reduce": True}),
    "moe serial": (1, {}),
    "moe ep2": (2, {"expert_model_parallel_size": 2}),
    "moe tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "moe etp2": (2, {"expert_tensor_parallel_size": 2}),
    "moe ep2 tp2 sp": (
        2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    ),
    "moe ep2 etp2 tp2 sp": (
        4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2},
    ),
    "moe pp2 ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}  # fmt: skip


def make_policy(folder: Path, adapter: Path | None, parallel: dict, *, targets=ALL, dtype="float32", **sections):
    from functools import partial

    from megatron_srpo.bridge import load_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy

    lora = {"rank": 4, "alpha": 8.0, "targets": targets, "path": str(adapter or "")} | sections.pop("lora", {})
    model = {"path": str(folder), "dtype": dtype} | sections.pop("model", {})
    config = Config(
        model=model, lora=lora, data={"train": "unused"}, parallel=parallel,
        algorithm={"kl_loss_coef": 0.1}, **{"optimizer": {"lr": 1e-3}, **sections},
    )  # fmt: skip
    path = choose_device("auto", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=2)
    load = partial(load_weights, hf_dir=folder, lora=config.lora)
    return Policy(config, read_config(folder), topology, path, load, total_steps=10)


def loss_of(given, row):
    from megatron_srpo.core.metrics import Mean

    value = -logprobs(given, row).sum() / 96
    return value, {"loss": Mean(value.detach() * 96, value.new_tensor(float(row.targets.numel())))}


def exported(policy, model, shards):
    from megatron_srpo.bridge import Exporter, read_config

    return {name: value.to("cpu", copy=True) for name, value in Exporter(shards, read_config(model)).items()}


def gradients(policy, model):
    """The summed gradient of every factor under peft's name, on every rank."""
    import dataclasses

    import torch.distributed as dist

    from megatron_srpo.mcore.experts import is_expert

    shards, topology = policy.shards.of_adapters(), policy.topology
    mine = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in shards.parameters.items()}
    by_parameter = {id(p): mine[name] for name, p in shards.parameters.items()}
    for shard in policy.optimizer.shards():
        part = slice(shard.start, shard.stop)
        by_parameter[id(shard.parameter)].view(-1)[part] = shard.parameter.main_grad.view(-1)[part]
    for name, value in mine.items():
        expert = is_expert(shards.parameters[name])
        dist.all_reduce(value, group=topology.expert_dp_group if expert else topology.dp_cp_group)
    return exported(policy, model, dataclasses.replace(shards, parameters=mine))


def one_step(model, adapter, layout, targets, how):
    """Loss, norm, gradients and merged weights of a step."""
    policy = make_policy(model, adapter, LAYOUTS[layout][1], targets=targets, **how)
    base = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
    merged = exported(policy, model, policy.shards)
    seen, step = {}, policy.optimizer.step

    def capture(lr):
        seen["gradients"] = gradients(policy, model)
        return step(lr)

    policy.optimizer.step = capture
    rows = _rows(policy.topology.dp_rank, policy.topology.dp_size)
    stats = policy.train_step(rows, loss_of)
    assert all(torch.equal(base[name], value) for name, value in policy.shards.parameters.items())
    trained = sum(value.numel() for value in policy.shards.adapters.values())
    held = sum(buffer.numel() for buffer in policy.optimizer.gradients())
    assert trained <= held < trained + 2000, "gradients of adapters alone, but for padding"
    assert {id(s.parameter) for s in policy.optimizer.shards()} <= {id(p) for p in policy.shards.adapters.values()}
    return {
        "loss": float(stats.metrics["loss"]),
        "norm": stats.grad_norm,
        "merged": merged,
        "base": policy.base,
        **seen,
    }


def reference_step(model, adapter):
    adapted = load_adapted(model, adapter)
    loss = summed_loss(lambda ids: adapted(ids).logits) / 96
    loss.backward()
    found = adapter_tensors(adapted, lambda parameter: parameter.grad)
    merged = adapted.merge_and_unload()
    return {"loss": float(loss.detach()), "gradients": found, "merged": dict(merged.state_dict())}


def summed_loss(logits_of):
    """−Σ log-prob of the targets of all rows, a sequence at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row in _rows(0, 1):
        bounds = row.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            logp = logits_of(row.input_ids[None, start:stop])[0].log_softmax(-1)
            total = total - logp.gather(1, row.targets[start:stop, None]).sum()
    return total


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    model = make_tiny_model(folder / "model", "qwen3", tied=True, vocab=VOCAB, layers=4)
    return model, make_adapter(model, folder / "adapter", targets=ALL)


def check_step(found, expected, bound=5e-5):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    largest = max(float(value.abs().max()) for value in expected["gradients"].values())
    for name, value in expected["gradients"].items():
        error = float((found["gradients"][name].double() - value).abs().max())
        assert error <= bound * largest, f"{name}: off by {error} of {largest}"
    norm = sum(float(value.square().sum()) for value in expected["gradients"].values()) ** 0.5
    assert found["norm"] == pytest.approx(norm, rel=1e-4)
    for name, value in found["merged"].items():
        assert float((value.double() - expected["merged"][name]).abs().max()) <= 1e-6, name


DEFAULT = ("tp2", "pp2 interleaved", "moe ep2 etp2 tp2 sp")  # the others are in the slow suite


def layouts(*, moe: bool):
    """The layouts with or without experts, those that are not in DEFAULT for the slow suite alone."""
    names = [name for name in LAYOUTS if name.startswith("moe") == moe]
    return [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("layout", layouts(moe=False))
def test_a_step_equals_peft_in_float64(qwen3, layout):
    model, adapter = qwen3
    found = run_distributed(one_step, LAYOUTS[layout][0], model, adapter, layout, ALL, {})
    check_step(found[0], reference_step(model, adapter))


def test_some_projections_of_recomputed_layers_equal_peft(tmp_path):
    """Parts of fused layers, biases on q, k and v, another scale, and hidden states that need a gradient only because
    of the adapters."""
    some = ["q_proj", "v_proj", "o_proj", "up_proj"]
    model = make_tiny_model(tmp_path / "model", "qwen2", tied=False, vocab=VOCAB, layers=4)
    adapter = make_adapter(model, tmp_path / "adapter", targets=some, rslora=True)
    how = {"model": {"recompute": "full"}, "lora": {"rslora": True}}
    found = run_distributed(one_step, 2, model, adapter, "tp2 sp", some, how)
    check_step(found[0], reference_step(model, adapter))


EVERYTHING = [*ALL, "experts"]


def moe_with_adapter(folder, targets):
    """A model with a dense layer, an adapter by peft's names of single experts, and its factors."""
    from megatron_srpo.bridge import read_config, weight_table, write_adapter_folder
    from megatron_srpo.config import LoraConfig

    model = make_tiny_model(folder / "model", "qwen3_moe", tied=False, vocab=VOCAB, layers=4, dense_layers=(1,))
    settings = LoraConfig(rank=4, alpha=8.0, targets=targets)
    names = weight_table(read_config(model), VOCAB).adapter_names(settings.projections, experts=True)
    weights, generator = hub_names(dict(load(model).named_parameters())), torch.Generator().manual_seed(5)

    def factor(name: str) -> torch.Tensor:
        base, _, kind = name.removesuffix(".weight").rpartition(".")
        rows, columns = weights[f"{base}.weight"].shape
        shape = (4, columns) if kind == "lora_A" else (rows, 4)
        return torch.randn(shape, generator=generator) * 0.1

    tensors = {name: factor(name) for name in sorted(names)}
    return model, write_adapter_folder(tensors.items(), folder / "adapter", settings, str(model)), tensors


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory):
    return moe_with_adapter(tmp_path_factory.mktemp("qwen3_moe"), EVERYTHING)


def chain_rule(model, tensors, scale):
    """Loss, gradients of the factors, and merged weights, from the gradients of the merged weights: with W + s·B·A the
    gradient of A is s·Bᵀ·G and that of B is s·G·Aᵀ."""
    merged, factors = load(model), {name: value.double() for name, value in tensors.items()}
    weights = {name: value.detach().clone() for name, value in hub_names(dict(merged.named_parameters())).items()}
    projections = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")}
    for name in projections:
        weights[f"{name}.weight"] += scale * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    put_weights(merged, weights)
    loss = summed_loss(lambda ids: merged(ids).logits) / 96
    loss.backward()
    of_weights = hub_names({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in merged.named_parameters()})
    found = {}
    for name in projections:
        gradient = of_weights[f"{name}.weight"]
        found[f"{name}.lora_A.weight"] = scale * factors[f"{name}.lora_B.weight"].T @ gradient
        found[f"{name}.lora_B.weight"] = scale * gradient @ factors[f"{name}.lora_A.weight"].T
    return {"loss": float(loss.detach()), "gradients": found, "merged": weights}


@pytest.mark.parametrize("layout", layouts(moe=True))
def test_a_step_of_experts_with_adapters_equals_float64(qwen3_moe, layout):
    model, adapter, tensors = qwen3_moe
    found = run_distributed(one_step, LAYOUTS[layout][0], model, adapter, layout, EVERYTHING, {})
    check_step(found[0], chain_rule(model, tensors, 8 / 4))


def test_a_step_of_adapters_on_experts_alone_equals_float64(tmp_path):
    """No dense parameter is trained, and Megatron's optimizer of the dense ones is a stub."""
    model, adapter, tensors = moe_with_adapter(tmp_path, ["experts"])
    found = run_distributed(one_step, 2, model, adapter, "moe ep2", ["experts"], {})
    check_step(found[0], chain_rule(model, tensors, 8 / 4))
