"""Builds a Megatron GPTModel from a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_srpo.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig, ModelShape, family_of
from megatron_srpo.mcore import few_passes, lora, rotary
from megatron_srpo.mcore.attention import PackedAttention
from megatron_srpo.mcore.experts import expert_layer_mlp, mark_experts
from megatron_srpo.mcore.groups import Topology, virtual_size
from megatron_srpo.mcore.rope_scaling import scaled_rotary


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight carries Megatron's mark that its gradient is summed over tensor-parallel ranks.

    Under sequence parallelism every rank normalises its own part of the sequence, and Megatron's
    `finalize_model_grads` sums the gradients that carry the mark. Megatron's local norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  # Megatron's attribute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, …, H]. torch has one kernel for it on GPUs and none on CPUs."""
        if x.device.type != "cpu" or x.dtype == torch.bfloat16:
            return super().forward(x)
        return few_passes.RMSNorm.apply(x, self.weight, self.eps)


class DeferredHead(ColumnParallelLinear):
    """Megatron's LM head without its matrix product. The objective computes it in chunks, so that the logits of a row
    never exist as a whole."""

    def forward(self, input_: torch.Tensor, *unused: object, **also_unused: object) -> tuple[torch.Tensor, None]:
        """Returns the hidden states [T, 1, H] unchanged; under sequence parallelism they are this rank's tokens."""
        return input_, None


def head_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    """The LM head's weight on the last pipeline stage. If it is tied and the embedding is on the same stage, it is the
    embedding's parameter."""
    gpt = unwrap(module)
    return (
        gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else gpt.output_layer.weight
    )


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding: vocab_size rounded up to a multiple of the tensor parallel size."""
    return -(-vocab_size // tp_size) * tp_size


def uneven_layout(layers: int, stages: int, pieces: int) -> list[list[str]] | None:
    """Megatron's pipeline layout if `stages` · `pieces` does not divide the number of layers, else None.

    The remaining layers go to the pieces in the middle first, then to the first one, then to the last one, which has
    the LM head.
    """
    each, more = divmod(layers, stages * pieces)
    if not more:
        return None
    last = stages * pieces - 1
    order = [*range(1, last), 0, last]
    counts = [each + (piece in order[:more]) for piece in range(last + 1)]
    layout = [["decoder"] * count for count in counts]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def transformer_config(
    hf: HfConfig, model: ModelConfig, parallel: ParallelConfig, *, on_cuda: bool, transformer_engine: bool = False,
    grouped_experts: bool = True,
) -> TransformerConfig:  # fmt: skip
    """Megatron's configuration: the family's fields, and those that follow from our settings."""
    bf16 = model.dtype == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shape = ModelShape.from_hf(hf)
    fields: dict[str, Any] = {
        **family_of(hf).config(shape),
        "activation_func": F.silu,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual_size(parallel),
        "pipeline_model_parallel_layout": uneven_layout(
            shape.layers, pp, parallel.virtual_pipeline_model_parallel_size
        ),
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": bf16,
        "use_cpu_initialization": not on_cuda,
        "gradient_accumulation_fusion": not on_cuda,  # mcore/cpu_shim.py; on GPUs it needs apex
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        **fusions(transformer_engine, experts=bool(shape.experts)),
        "batch_p2p_comm": False,
        # Gradients are sums, because the objective divides by its own global denominators: see step.py.
        "calculate_per_token_loss": True,
        # Rows differ in length. Megatron couples this flag to a dispatcher even in dense models. With an interleaved
        # schedule its exchange of shapes confuses the two directions between two stages, so there the rows of one pass
        # have the same length and the flag is off.
        "variable_seq_lengths": pp > 1 and parallel.virtual_pipeline_model_parallel_size == 1,
        "moe_token_dispatcher_type": "alltoall",
    }
    if shape.rope_kind != "default":
        # Cosine and sine are multiplied by the factor, so that queries times keys are by its square.
        fields["softmax_scale"] = scaled_rotary(hf).attention_factor ** 2 / math.sqrt(shape.head_dim)
    if shape.experts:
        fields["moe_grouped_gemm"] = transformer_engine and grouped_experts
        fields["expert_model_parallel_size"] = parallel.expert_model_parallel_size
        fields["expert_tensor_parallel_size"] = parallel.expert_tensor_parallel_size
    fields.update(recompute_fields(model))
    if model.fp8 != "off":
        fields.update(fp8=model.fp8, fp8_recipe="tensorwise")
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{name: value for name, value in fields.items() if name in known})


def fusions(transformer_engine: bool, *, experts: bool) -> dict[str, bool]:
    """Megatron's fused operations. They need Transformer Engine's kernels, or compile for a GPU."""
    return {
        "apply_rope_fusion": transformer_engine,  # without it: mcore/rotary.py
        "bias_activation_fusion": transformer_engine,
        "use_te_activation_func": not transformer_engine,  # Megatron's name: `activation_func` takes gate and up as one
        "bias_dropout_fusion": transformer_engine,
        "moe_permute_fusion": transformer_engine and experts,
    }


def recompute_fields(model: ModelConfig) -> dict[str, Any]:
    """Megatron's settings for recomputation in the backward pass."""
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}
    if model.recompute == "full":
        method, count = ("block", model.recompute_layers) if model.recompute_layers else ("uniform", 1)
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
    return {}


def layer_specs(
    config: TransformerConfig, virtual_stage: int | None, *, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its piece `virtual_stage`. They are Transformer Engine's, or Megatron's
    local ones with our norm and attention."""
    start = get_transformer_layer_offset(config, virtual_stage)
    stop = start + get_num_layers_to_build(config, virtual_stage)
    kinds = config.moe_layer_freq[start:stop] if config.num_moe_experts else [0] * (stop - start)
    build = _transformer_engine_layer if transformer_engine else _local_layer
    specs = {kind: build(config, experts=bool(kind)) for kind in set(kinds)}
    norm: type[torch.nn.Module] = SequenceParallelRMSNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)


def _transformer_engine_layer(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    count = config.num_moe_experts if experts else None
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=count, moe_grouped_gemm=config.moe_grouped_gemm and experts, qk_layernorm=config.qk_layernorm
    )
    from megatron_srpo.mcore.te_attention import SharedPromptAttention

    layer.submodules.self_attention.submodules.core_attention = SharedPromptAttention
    if experts:
        layer.submodules.mlp = expert_layer_mlp(config, transformer_engine=True)
    return layer


def _local_layer(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    if experts:
        parts.mlp = expert_layer_mlp(config, transformer_engine=False)
        # Transformer Engine fuses this norm into the first product of a dense MLP, but not before experts.
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return layer


def build_model(
    hf: HfConfig, model: ModelConfig, parallel: ParallelConfig, topology: Topology, *, transformer_engine: bool,
    adapters: LoraConfig | None = None, seed: int = 0,
) -> list[torch.nn.Module]:  # fmt: skip
    """This rank's GPTModel, in a Float16Module for bf16. Its weights are random: load weights into it. Under an
    interleaved pipeline the result has several pieces, in order. `adapters` with a rank above 0 adds new LoRA adapters,
    which `seed` draws, and freezes all weights."""
    if model.fp8 != "off" and not transformer_engine:
        raise UserError(
            f'model.fp8 = "{model.fp8}" needs Transformer Engine on a GPU, which is not there: set it to "off", or see '
            "what is missing: python -m megatron_srpo doctor"
        )
    rotary.install()
    on_cuda = topology.device.type == "cuda"
    adapters = adapters if adapters is not None and adapters.rank else None
    # Grouped products of experts have no adapters: each expert then has layers of its own.
    config = transformer_config(
        hf, model, parallel, on_cuda=on_cuda, transformer_engine=transformer_engine,
        grouped_experts=adapters is None or not adapters.experts,
    )  # fmt: skip
    shape = ModelShape.from_hf(hf)
    positions: dict[str, Any] = dict(family_of(hf).model(shape))
    count = parallel.virtual_pipeline_model_parallel_size
    pieces = []
    for stage in range(count):
        virtual_stage = stage if count > 1 else None
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=layer_specs(config, virtual_stage, transformer_engine=transformer_engine),
            vocab_size=padded_vocab_size(shape.vocab, topology.tp_size),
            max_sequence_length=shape.max_positions,
            pre_process=topology.pp_rank == 0 and stage == 0,
            post_process=topology.is_last_stage and stage == count - 1,
            share_embeddings_and_output_weights=shape.tied,
            parallel_output=True,
            vp_stage=virtual_stage,
            **positions,
        )
        if shape.rope_kind != "default":
            gpt.rotary_pos_emb.inv_freq = scaled_rotary(hf).inverse_frequencies.to(gpt.rotary_pos_emb.inv_freq.device)
        if gpt.post_process:
            gpt.output_layer.__class__ = DeferredHead
        if config.use_te_activation_func:
            for module in gpt.modules():
                if isinstance(module, MLP):  # also an expert
                    module.activation_func = few_passes.swiglu
        mark_experts(gpt)
        gpt.to(topology.device)
        if adapters is not None:
            lora.attach(gpt, adapters, topology, seed=seed)
        pieces.append(Float16Module(config, gpt) if config.bf16 else gpt)
    return pieces


def unwrap(module: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def model_shards(model: list[torch.nn.Module], topology: Topology, vocab_size: int) -> ModelShards:
    """The model as the bridge uses it: parameters by names with global layer and expert numbers."""
    parameters: dict[str, torch.Tensor] = {}
    adapters: dict[str, torch.Tensor] = {}
    merged: dict[str, Callable[[], torch.Tensor]] = {}
    for gpt in map(unwrap, model):
        first_expert = topology.ep_rank * (gpt.config.num_moe_experts or 0) // topology.ep_size
        global_number = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(gpt.decoder.layers)}

        def globally(name: str, numbers: dict[str, str] = global_number, first: int = first_expert) -> str:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = numbers[parts[2]]
            if ".experts." in name:
                parts = [_global_expert(part, before, first) for before, part in pairwise(["", *parts])]
            return ".".join(parts)

        for name, parameter in gpt.named_parameters():
            (adapters if lora.MARK in name else parameters)[globally(name)] = parameter
        merged |= {globally(name): make for name, make in lora.merged_weights(gpt).items()}
    return ModelShards(
        parameters=parameters,
        adapters=adapters,
        merged=merged,
        tp_rank=topology.tp_rank,
        tp_size=topology.tp_size,
        tp_group=topology.tp_group if topology.tp_size > 1 else None,
        pp_rank=topology.pp_rank,
        pp_size=topology.pp_size,
        pp_group=topology.pp_group if topology.pp_size > 1 else None,
        padded_vocab_size=padded_vocab_size(vocab_size, topology.tp_size),
        ep_rank=topology.ep_rank,
        ep_size=topology.ep_size,
        etp_rank=topology.etp_rank,
        etp_size=topology.etp_size,
        expert_group=topology.expert_group if topology.ep_size * topology.etp_size > 1 else None,
    )


def _global_expert(part: str, before: str, first: int) -> str:
    """A part of a parameter's name, with the expert's global number. The number follows the part "local_experts", or,
    in grouped products, the word "weight"."""
    if before == "local_experts":
        return str(int(part) + first)
    if part.startswith("weight") and part != "weight":
        return f"weight{int(part.removeprefix('weight')) + first}"
    return part
