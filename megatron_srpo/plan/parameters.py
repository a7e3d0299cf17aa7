"""Numbers of parameters that one rank holds, and that it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.layout import Layout, stage_layers


@dataclass(frozen=True)
class StageParameters:
    """Number of parameters of one rank: `ordinary` ones of all data-parallel ranks, and those of its experts."""

    ordinary: int
    experts: int

    @property
    def whole(self) -> int:
        return self.ordinary + self.experts


def stage_parameters(arch: Architecture, layout: Layout, stage: int) -> StageParameters:
    """Number of parameters of a rank of pipeline stage `stage` (from 0), without adapters. Projections are split over
    tensor-parallel ranks and experts over expert-parallel ranks; norms and routers are complete on each rank. The
    embedding is on the first stage and, as the head, on the last."""
    layers = stage_layers(arch.layers, layout)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    return _stage_parameters(arch, layout.tensor, layout.expert, layout.expert_tensor, layers, first, last)


@cache  # a search asks millions of times, and there are few answers
def _stage_parameters(
    arch: Architecture, t: int, expert: int, expert_tensor: int, layers: int, first: bool, last: bool
) -> StageParameters:
    bias = (arch.query + 2 * arch.key if arch.qkv_bias else 0) // t
    layer = (arch.attention_matrices + arch.mlp_matrices) // t + bias + arch.small_vectors + arch.experts * arch.hidden
    vocabulary = math.ceil(arch.vocab / t) * arch.hidden
    ordinary = layers * layer + (vocabulary if first else 0)
    if last:
        ordinary += arch.hidden + (0 if arch.tied and first else vocabulary)
    experts = layers * arch.experts // expert * (arch.expert_matrices // expert_tensor)
    return StageParameters(ordinary, experts)


def adapter_parameters(arch: Architecture, layout: Layout, stage: int) -> StageParameters:
    """Number of parameters of a rank's LoRA adapters on pipeline stage `stage`. One factor of a projection is split
    over tensor-parallel ranks as its weight is, and the other is complete on each rank (mcore/lora.py)."""
    layers, rank = stage_layers(arch.layers, layout)[stage], layout.lora_rank
    one = sum(_factors(arch, arch.ffn, layout.tensor)[name] for name in adapted_projections(arch, layout))
    expert = sum(_factors(arch, arch.expert_ffn, layout.expert_tensor)[name] for name in MLP)
    experts = layers * arch.experts // layout.expert * expert if layout.lora_experts else 0
    return StageParameters(rank * layers * one, rank * experts)


def trained_parameters(arch: Architecture, layout: Layout, stage: int) -> StageParameters:
    """What has gradients, optimizer state and a place in the teacher's average: the adapters, or else all weights."""
    return (adapter_parameters if layout.lora_rank else stage_parameters)(arch, layout, stage)


def published_adapters(arch: Architecture, layout: Layout) -> tuple[int, int]:
    """(numbers, tensors) of a publish of adapters alone (LoraConfig.published); (0, 0) if it has whole models."""
    merged = arch.experts > 0 if layout.lora_merged is None else layout.lora_merged
    if not layout.lora_rank or merged:
        return 0, 0
    names = adapted_projections(arch, layout)
    one = sum(_factors(arch, arch.ffn, 1)[name] for name in names)
    return layout.lora_rank * arch.layers * one, 2 * arch.layers * len(names)


def fullest_stage(arch: Architecture, layout: Layout) -> tuple[int, float]:
    """Trained parameters of a rank of the largest pipeline stage: all of them, and its optimizer's share of them."""
    stages = {0, stage_layers(arch.layers, layout).index(max(stage_layers(arch.layers, layout))), layout.pipeline - 1}
    parts = [trained_parameters(arch, layout, stage) for stage in stages]
    shares = [part.ordinary / layout.sharding + part.experts / layout.expert_sharding for part in parts]
    return max(part.whole for part in parts), max(shares)


MLP = ("gate_proj", "up_proj", "down_proj")


def adapted_projections(arch: Architecture, layout: Layout) -> tuple[str, ...]:
    """The projections of each layer that have adapters, without those of experts."""
    return tuple(name for name in layout.lora_projections if arch.ffn or name not in MLP)


def _factors(arch: Architecture, ffn: int, split: int) -> dict[str, int]:
    """Numbers of both factors of a projection on one of `split` ranks, for each of the adapter's rank r."""
    query, key, width = arch.query // split, arch.key // split, ffn // split
    rows = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query} | dict.fromkeys(MLP, width)
    return {name: arch.hidden + other for name, other in rows.items()}
