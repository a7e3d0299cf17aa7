"""Qwen3, dense: Llama's decoder with a norm on every query and key head."""

from __future__ import annotations

from megatron_srpo.bridge.families.llama import ATTENTION, DENSE_DECODER, HF
from megatron_srpo.bridge.families.table import Family, Line, replicated

QWEN3 = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    ("qwen3",),
    (
        *DENSE_DECODER,
        Line(ATTENTION + "q_layernorm.weight", (HF + "self_attn.q_norm.weight",), replicated),
        Line(ATTENTION + "k_layernorm.weight", (HF + "self_attn.k_norm.weight",), replicated),
    ),
)
