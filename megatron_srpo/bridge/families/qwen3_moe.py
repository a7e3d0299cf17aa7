"""Qwen3 with a mixture of experts in all or some of its layers; one tensor an expert and projection on the hub."""

from __future__ import annotations

from megatron_srpo.bridge.families.llama import HF, MLP
from megatron_srpo.bridge.families.qwen3 import QWEN3
from megatron_srpo.bridge.families.table import Family, Line, gated_mlp, replicated, row

_EXPERT = HF + "mlp.experts.{expert}."
_GATE_UP = (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight")
_DOWN = (_EXPERT + "down_proj.weight",)

QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    ("qwen3_moe",),
    (
        *QWEN3.lines,  # some layers may be dense
        Line(MLP + "router.weight", (HF + "mlp.gate.weight",), replicated),
        Line(MLP + "experts.local_experts.{expert}.linear_fc1.weight", _GATE_UP, gated_mlp),
        Line(MLP + "experts.local_experts.{expert}.linear_fc2.weight", _DOWN, row),
        Line(MLP + "experts.linear_fc1.weight{expert}", _GATE_UP, gated_mlp),  # Transformer Engine's grouped products
        Line(MLP + "experts.linear_fc2.weight{expert}", _DOWN, row),
    ),
)
