"""Llama: the plain dense decoder (Llama 2 and 3, SmolLM2, Mistral-like checkpoints saved as Llama)."""

from __future__ import annotations

from megatron_srpo.bridge.families.table import (
    EMBEDDING,
    OUTPUT,
    Family,
    Line,
    gated_mlp,
    qkv,
    replicated,
    row,
    vocab,
)

MLP, ATTENTION = "decoder.layers.{layer}.mlp.", "decoder.layers.{layer}.self_attention."
HF = "model.layers.{layer}."
_GATE_UP = (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight")
_QKV = tuple(HF + f"self_attn.{part}_proj.weight" for part in "qkv")
_INPUT_NORM, _MLP_NORM = (HF + "input_layernorm.weight",), (HF + "post_attention_layernorm.weight",)

DENSE_DECODER = (
    Line(EMBEDDING, ("model.embed_tokens.weight",), vocab),
    Line("decoder.layers.{layer}.input_layernorm.weight", _INPUT_NORM, replicated),
    Line(ATTENTION + "linear_qkv.layer_norm_weight", _INPUT_NORM, replicated),  # Transformer Engine's name
    Line(ATTENTION + "linear_qkv.weight", _QKV, qkv),
    Line(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), row),
    Line("decoder.layers.{layer}.pre_mlp_layernorm.weight", _MLP_NORM, replicated),
    Line(MLP + "linear_fc1.layer_norm_weight", _MLP_NORM, replicated),  # Transformer Engine's name
    Line(MLP + "linear_fc1.weight", _GATE_UP, gated_mlp),
    Line(MLP + "linear_fc2.weight", (HF + "mlp.down_proj.weight",), row),
    Line("decoder.final_layernorm.weight", ("model.norm.weight",), replicated),
    Line(OUTPUT, ("lm_head.weight",), vocab),
)

LLAMA = Family("llama", ("LlamaForCausalLM",), ("llama",), DENSE_DECODER)
