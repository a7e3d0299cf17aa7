"""Qwen2 and Qwen2.5, dense: Llama's decoder with biases on query, key and value."""

from __future__ import annotations

from dataclasses import replace

from megatron_srpo.families.family import Line, Settings, Split
from megatron_srpo.families.llama import ATTENTION, HF, LLAMA, decoder_config
from megatron_srpo.families.shape import ModelShape

_BIASES = tuple(HF + f"self_attn.{part}_proj.bias" for part in "qkv")


def _config(shape: ModelShape) -> Settings:
    return decoder_config(shape) | {"add_qkv_bias": True}  # config.json has no key that says so


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    lines=(*LLAMA.lines, Line(ATTENTION + "linear_qkv.bias", _BIASES, Split.QKV)),
    config=_config,
)
