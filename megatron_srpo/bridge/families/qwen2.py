"""Qwen2 and Qwen2.5, dense: Llama's decoder with biases on query, key and value."""

from __future__ import annotations

from megatron_srpo.bridge.families.llama import ATTENTION, DENSE_DECODER, HF
from megatron_srpo.bridge.families.table import Family, Line, qkv

_BIASES = tuple(HF + f"self_attn.{part}_proj.bias" for part in "qkv")

QWEN2 = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    ("qwen2",),
    (*DENSE_DECODER, Line(ATTENTION + "linear_qkv.bias", _BIASES, qkv)),
)
