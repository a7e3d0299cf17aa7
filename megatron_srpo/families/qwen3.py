"""Qwen3, dense: Llama's decoder with a norm on every query and key head."""

from __future__ import annotations

from dataclasses import replace

from megatron_srpo.families.family import Line, Settings, Split
from megatron_srpo.families.llama import ATTENTION, HF, LLAMA, decoder_config
from megatron_srpo.families.shape import ModelShape


def qwen3_config(shape: ModelShape) -> Settings:
    """Megatron's TransformerConfig of a dense Qwen3."""
    return decoder_config(shape) | {"qk_layernorm": True}


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    lines=(
        *LLAMA.lines,
        Line(ATTENTION + "q_layernorm.weight", (HF + "self_attn.q_norm.weight",), Split.REPLICATED),
        Line(ATTENTION + "k_layernorm.weight", (HF + "self_attn.k_norm.weight",), Split.REPLICATED),
    ),
    config=qwen3_config,
)
