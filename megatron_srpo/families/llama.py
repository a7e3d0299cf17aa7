"""Llama: the plain dense decoder (Llama 2, 3 to 3.3, SmolLM2)."""

from __future__ import annotations

from megatron_srpo.families.family import EMBEDDING, OUTPUT, Family, Line, Settings, Split
from megatron_srpo.families.rope import rope_problems
from megatron_srpo.families.shape import HfConfig, ModelShape

MLP, ATTENTION = "decoder.layers.{layer}.mlp.", "decoder.layers.{layer}.self_attention."
HF = "model.layers.{layer}."
_GATE_UP = (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight")
_QKV = tuple(HF + f"self_attn.{part}_proj.weight" for part in "qkv")
_INPUT_NORM, _MLP_NORM = (HF + "input_layernorm.weight",), (HF + "post_attention_layernorm.weight",)

DENSE_DECODER = (
    Line(EMBEDDING, ("model.embed_tokens.weight",), Split.VOCAB),
    Line("decoder.layers.{layer}.input_layernorm.weight", _INPUT_NORM, Split.REPLICATED),
    Line(ATTENTION + "linear_qkv.layer_norm_weight", _INPUT_NORM, Split.REPLICATED),  # Transformer Engine's name
    Line(ATTENTION + "linear_qkv.weight", _QKV, Split.QKV),
    Line(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), Split.ROW),
    Line("decoder.layers.{layer}.pre_mlp_layernorm.weight", _MLP_NORM, Split.REPLICATED),
    Line(MLP + "linear_fc1.layer_norm_weight", _MLP_NORM, Split.REPLICATED),  # Transformer Engine's name
    Line(MLP + "linear_fc1.weight", _GATE_UP, Split.GATED_MLP),
    Line(MLP + "linear_fc2.weight", (HF + "mlp.down_proj.weight",), Split.ROW),
    Line("decoder.final_layernorm.weight", ("model.norm.weight",), Split.REPLICATED),
    Line(OUTPUT, ("lm_head.weight",), Split.VOCAB),
)
NUMBERS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


READ_BY_ENGINES_ALONE = {
    "logit_scale": 1.0, "is_causal": True, "qk_norm": False, "bias": False, "shared_expert_intermediate_size": 0,
}  # fmt: skip


def decoder_config(shape: ModelShape) -> Settings:
    """Megatron's TransformerConfig of a dense decoder."""
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }


def rotary_model(shape: ModelShape) -> Settings:
    """Megatron's GPTModel with rotary embedding of whole heads. mcore/rope_scaling.py scales it."""
    return {"position_embedding_type": "rope", "rotary_base": shape.rope_theta}


def decoder_refusals(hf: HfConfig) -> list[str]:
    """What a dense decoder's config.json may ask for and we would compute wrongly."""
    problems = rope_problems(hf)
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(key):
            problems.append(f"{key} is true in its config.json; expected false, others are not supported")
    # vLLM reads these keys, and transformers' classes of our families do not, or read them otherwise.
    layers = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    if layers:
        problems.append(f'layer_types has "{layers[0]}"; expected full attention in every layer')
    for key, usual in READ_BY_ENGINES_ALONE.items():
        if hf.get(key) not in (None, usual):
            problems.append(f"{key} is {hf[key]!r} in its config.json; expected {usual!r}, others are not supported")
    if hf.get("hidden_act", "silu") != "silu":
        problems.append(f'hidden_act is "{hf["hidden_act"]}"; expected "silu"')
    if hf.get("quantization_config"):
        problems.append("its weights are quantized; expected the bfloat16 or float32 model")
    return problems


LLAMA = Family(
    "llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    lines=DENSE_DECODER,
    config=decoder_config,
    model=rotary_model,
    numbers=NUMBERS,
    refusals=decoder_refusals,
)
