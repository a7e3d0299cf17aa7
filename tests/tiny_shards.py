"""Empty Megatron shards with the names and shapes that Megatron Core gives them, without Megatron Core."""

from __future__ import annotations

from typing import Any

import torch

from megatron_srpo.core.tensors import ModelShards


def _layer_shapes(hf: dict[str, Any], tp: int, *, transformer_engine: bool) -> dict[str, tuple[int, ...]]:
    hidden = hf["hidden_size"]
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    head_dim = hf.get("head_dim", hidden // heads)
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if transformer_engine else "input_layernorm.weight"
    shapes = {
        input_norm: (hidden,),
        "self_attention.linear_proj.weight": (hidden, heads * head_dim // tp),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head_dim // tp, hidden),
    }
    if hf["architectures"][0].startswith("Qwen2"):
        shapes["self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * head_dim // tp,)
    if hf["architectures"][0].startswith("Qwen3"):
        shapes |= {f"self_attention.{part}_layernorm.weight": (head_dim,) for part in "qk"}
    return shapes


def _dense_shapes(hf: dict[str, Any], tp: int, *, transformer_engine: bool) -> dict[str, tuple[int, ...]]:
    hidden, ffn = hf["hidden_size"], hf["intermediate_size"]
    norm = "mlp.linear_fc1.layer_norm_weight" if transformer_engine else "pre_mlp_layernorm.weight"
    return {
        norm: (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn // tp, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn // tp),
    }


def _expert_shapes(hf: dict[str, Any], etp: int, run: range, *, transformer_engine: bool) -> dict[str, tuple[int, ...]]:
    hidden, ffn = hf["hidden_size"], hf["moe_intermediate_size"]
    shapes = {"pre_mlp_layernorm.weight": (hidden,), "mlp.router.weight": (hf["num_local_experts"], hidden)}
    name = (
        "mlp.experts.{product}.weight{expert}"
        if transformer_engine
        else ("mlp.experts.local_experts.{expert}.{product}.weight")
    )
    for expert in run:
        shapes[name.format(expert=expert, product="linear_fc1")] = (2 * ffn // etp, hidden)
        shapes[name.format(expert=expert, product="linear_fc2")] = (hidden, ffn // etp)
    return shapes


def empty_shards(
    hf: dict[str, Any], *, tp_rank: int = 0, tp_size: int = 1, tp_group: Any = None, pp_rank: int = 0, pp_size: int = 1,
    pp_group: Any = None, transformer_engine: bool = False, pad_to: int = 1, dtype: torch.dtype = torch.float32,
    **experts: Any,
) -> ModelShards:  # fmt: skip
    """The parameters of one rank, filled with NaN (so that one that is never written shows). Layers are dealt to stages
    in equal runs; the vocabulary is padded to a multiple of tp_size · pad_to. `experts`: the fields of ModelShards on
    expert parallelism."""
    multiple = tp_size * pad_to
    padded = -(-hf["vocab_size"] // multiple) * multiple
    vocab_shape = (padded // tp_size, hf["hidden_size"])
    first, last = pp_rank == 0, pp_rank == pp_size - 1
    per_stage = hf["num_hidden_layers"] // pp_size
    shapes: dict[str, tuple[int, ...]] = {}
    if first:
        shapes["embedding.word_embeddings.weight"] = vocab_shape
    for layer in range(pp_rank * per_stage, (pp_rank + 1) * per_stage):
        layer_shapes = _layer_shapes(hf, tp_size, transformer_engine=transformer_engine)
        if "moe_intermediate_size" in hf and layer not in hf["mlp_only_layers"]:
            count = hf["num_local_experts"] // experts.get("ep_size", 1)
            run = range(experts.get("ep_rank", 0) * count, (experts.get("ep_rank", 0) + 1) * count)
            etp = experts.get("etp_size", 1)
            layer_shapes |= _expert_shapes(hf, etp, run, transformer_engine=transformer_engine)
        else:
            layer_shapes |= _dense_shapes(hf, tp_size, transformer_engine=transformer_engine)
        for name, shape in layer_shapes.items():
            shapes[f"decoder.layers.{layer}.{name}"] = shape
    if last:
        shapes["decoder.final_layernorm.weight"] = (hf["hidden_size"],)
        if not hf["tie_word_embeddings"] or pp_size > 1:
            shapes["output_layer.weight"] = vocab_shape
    parameters = {
        name: torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)) for name, shape in shapes.items()
    }
    return ModelShards(parameters, tp_rank, tp_size, tp_group, pp_rank, pp_size, pp_group, padded, **experts)
