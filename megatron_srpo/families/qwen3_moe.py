"""Qwen3 with a mixture of experts in all or some of its layers. The hub has one tensor for each expert and
projection."""

from __future__ import annotations

from dataclasses import replace

from megatron_srpo.families.family import Line, Settings, Split
from megatron_srpo.families.llama import HF, MLP
from megatron_srpo.families.qwen3 import QWEN3, qwen3_config
from megatron_srpo.families.shape import HfConfig, ModelShape

_EXPERT = HF + "mlp.experts.{expert}."
_GATE_UP = (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight")
_DOWN = (_EXPERT + "down_proj.weight",)


def _config(shape: ModelShape) -> Settings:
    """The router is transformers': a softmax over all experts in fp32, the best k of them, renormalised if config.json
    says so. No token is dropped."""
    return qwen3_config(shape) | {
        "num_moe_experts": shape.experts,
        "moe_layer_freq": [int(has_experts) for has_experts in shape.expert_layers],
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_router_topk": shape.experts_per_token,
        # A softmax over the logits of the best k only is the renormalised softmax over all.
        "moe_router_pre_softmax": not shape.renormalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,  # mcore.experts.set_balancing sets it for each step
    }


def _refusals(hf: HfConfig) -> list[str]:
    problems = QWEN3.refusals(hf)
    if hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob"):
        problems.append("norm_topk_prob with one expert a token leaves its router without a gradient")
    old, new = hf.get("num_experts"), hf.get("num_local_experts")
    if old and new and old != new:
        problems.append(f"num_experts is {old} and num_local_experts is {new} in its config.json; keep the right one")
    return problems


QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    lines=(
        *QWEN3.lines,  # some layers may be dense
        Line(MLP + "router.weight", (HF + "mlp.gate.weight",), Split.REPLICATED),
        Line(MLP + "experts.local_experts.{expert}.linear_fc1.weight", _GATE_UP, Split.GATED_MLP),
        Line(MLP + "experts.local_experts.{expert}.linear_fc2.weight", _DOWN, Split.ROW),
        # Transformer Engine's grouped products
        Line(MLP + "experts.linear_fc1.weight{expert}", _GATE_UP, Split.GATED_MLP),
        Line(MLP + "experts.linear_fc2.weight{expert}", _DOWN, Split.ROW),
    ),
    config=_config,
    numbers=(*QWEN3.numbers, "num_experts_per_tok", "moe_intermediate_size", "num_experts"),
    refusals=_refusals,
)
