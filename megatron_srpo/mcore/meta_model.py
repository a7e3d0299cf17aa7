"""Builds the ranks of a layout, one after the other, in one process without memory for weights and without other ranks.

torch's fake process groups, which exchange nothing, let Megatron build the groups of any rank. The rank's model is
built on the meta device. So names, shapes and the place of every shard in the whole are Megatron's own, for all layers
and kinds of parallelism that it knows.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_srpo.config import Config, LoraConfig, ModelConfig, ParallelConfig
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig
from megatron_srpo.mcore import cpu_shim, groups
from megatron_srpo.mcore.checkpoint_state import model_state
from megatron_srpo.mcore.device import DevicePath
from megatron_srpo.mcore.model import build_model, model_shards, unwrap

META = DevicePath(torch.device("meta"), "fake", False, "Megatron Core's local layers on the meta device")


@contextmanager
def _meta_model(
    hf: HfConfig, model: ModelConfig, parallel: ParallelConfig, rank: int, world_size: int, seed: int = 0,
    adapters: LoraConfig | None = None,
) -> Iterator[tuple[groups.Topology, list[torch.nn.Module]]]:  # fmt: skip
    """The topology and the model of one rank, with process groups that only know their members."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_shim.install()
    excepthook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        topology = groups.initialize(parallel, META, seed=seed, timeout_minutes=1, control_backend="fake")
        with torch.device("meta"):
            pieces = build_model(hf, model, parallel, topology, transformer_engine=False, adapters=adapters)
        yield topology, pieces
    finally:
        groups.shutdown()
        sys.excepthook = excepthook  # torch has replaced it by one that prints the rank's number


# ---- one rank's part of a checkpoint ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a model, on the meta device.

    `places` says where the shards of `shards.parameters` belong in the checkpoint. It has only the parameters that this
    rank writes: a parameter that several ranks hold is written by one of them.
    """

    shards: ModelShards
    places: dict[str, ShardedTensor | ShardedTensorFactory]

    def pieces(self, name: str, data: torch.Tensor) -> list[ShardedTensor]:
        """The checkpoint's pieces of the parameter `name`, whose shard is `data` (any dtype)."""
        place = self.places[name]
        if isinstance(place, ShardedTensorFactory):
            return list(nested_values(dataclasses.replace(place, data=data).build()))
        return [dataclasses.replace(place, data=data, dtype=data.dtype)]

    def merge(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The shard of a parameter from the pieces that `pieces` made of it, in the same order."""
        place = self.places[name]
        return place.merge_fn(parts) if isinstance(place, ShardedTensorFactory) else parts[0]


def layout_size(parallel: ParallelConfig) -> int:
    """The number of ranks of one copy of the model, including its experts."""
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return parallel.pipeline_model_parallel_size * math.lcm(parallel.tensor_model_parallel_size, experts)


def rank_share(
    hf: HfConfig, parallel: ParallelConfig, rank: int, *, adapters: LoraConfig | None = None
) -> RankShare:  # fmt: skip
    """What rank `rank` of the layout holds of the model that this config.json describes, or of its adapters alone."""
    # Weights are the same with and without sequence parallelism, and Megatron requires it for experts.
    parallel = parallel.model_copy(update={"sequence_parallel": parallel.tensor_model_parallel_size > 1})
    model = ModelConfig(path="", dtype="float32")
    with _meta_model(hf, model, parallel, rank, layout_size(parallel), adapters=adapters) as (topology, pieces):
        shards = model_shards(pieces, topology, hf["vocab_size"])
        shards = shards.of_adapters() if shards.adapters else shards
        places = {id(entry.data): entry for entry in nested_values(model_state(pieces, topology))}
        written = {
            name: places[id(parameter)]
            for name, parameter in shards.parameters.items()
            if is_main_replica(places[id(parameter)].replica_id)
        }
        no_groups: dict[str, Any] = {f.name: None for f in dataclasses.fields(shards) if f.name.endswith("_group")}
        return RankShare(dataclasses.replace(shards, **no_groups), written)


# ---- the ranks of a job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetaRank:
    """One rank of a job as the job would build it."""

    rank: int
    stage: int
    layers: list[int]  # global numbers, from 0
    shards: ModelShards  # parameters on the meta device; its process groups exchange nothing


def distinct_ranks(config: Config, world_size: int) -> Iterator[tuple[int, int]]:
    """(rank, stage) of two ranks of every pipeline stage: the first tensor-parallel rank, and the last one, whose part
    of the vocabulary may be shorter. Data-, context- and expert-parallel ranks have the same shapes."""
    parallel = config.parallel
    for stage in range(parallel.pipeline_model_parallel_size):
        first = stage * (world_size // parallel.pipeline_model_parallel_size)
        for rank in sorted({first, first + parallel.tensor_model_parallel_size - 1}):
            yield rank, stage


def meta_ranks(config: Config, hf: HfConfig, world_size: int) -> Iterator[MetaRank]:
    """Build each distinct rank of a job, one after the other."""
    for rank, stage in distinct_ranks(config, world_size):
        given = (hf, config.model, config.parallel, rank, world_size, config.run.seed, config.lora)
        with _meta_model(*given) as (topology, pieces):
            layers = [layer.layer_number - 1 for piece in pieces for layer in unwrap(piece).decoder.layers]
            yield MetaRank(rank, stage, layers, model_shards(pieces, topology, hf["vocab_size"]))
