"""What every rank of a layout holds, told by Megatron itself, in one process and without memory for weights.

The process stands in for one rank after the other: torch's fake process groups (which exchange nothing) let Megatron
build that rank's groups, and its model is built on the meta device. Names, shapes and the place of every shard in the
whole are then Megatron's own account, for whatever layers and kinds of parallelism it knows.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_srpo.config import ModelConfig, ParallelConfig
from megatron_srpo.core.records import ModelShards
from megatron_srpo.mcore import groups
from megatron_srpo.mcore.checkpoint import model_state
from megatron_srpo.mcore.device import choose_device
from megatron_srpo.mcore.model import build_model, model_shards


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a model, on the meta device.

    `places` says for the parameters of `shards` where their shards belong in the checkpoint, as far as this rank and
    not a copy of it on another rank is the one to write them.
    """

    shards: ModelShards
    places: dict[str, ShardedTensor | ShardedTensorFactory]

    def pieces(self, name: str, data: torch.Tensor) -> list[ShardedTensor]:
        """What goes into the checkpoint of the parameter `name`, whose shard is `data` (any dtype)."""
        place = self.places[name]
        if isinstance(place, ShardedTensorFactory):
            return list(nested_values(dataclasses.replace(place, data=data).build()))
        return [dataclasses.replace(place, data=data, dtype=data.dtype)]

    def merge(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The shard of a parameter from what `pieces` made of it, in the same order."""
        place = self.places[name]
        return place.merge_fn(parts) if isinstance(place, ShardedTensorFactory) else parts[0]


def layout_size(parallel: ParallelConfig) -> int:
    """Ranks of one copy of the model, its experts included."""
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return parallel.pipeline_model_parallel_size * math.lcm(parallel.tensor_model_parallel_size, experts)


def rank_share(hf: dict[str, Any], parallel: ParallelConfig, rank: int) -> RankShare:
    """What rank `rank` of the layout holds of the model that this config.json describes."""
    # Weights are the same with and without it, and Megatron wants it for experts.
    parallel = parallel.model_copy(update={"sequence_parallel": parallel.tensor_model_parallel_size > 1})
    with _fake_groups(parallel, rank) as topology:
        with torch.device("meta"):
            model = build_model(hf, ModelConfig(path="", dtype="float32"), parallel, topology, transformer_engine=False)
        shards = model_shards(model, topology, hf["vocab_size"])
        places = {id(entry.data): entry for entry in nested_values(model_state(model, topology))}
        written = {
            name: places[id(parameter)]
            for name, parameter in shards.parameters.items()
            if is_main_replica(places[id(parameter)].replica_id)
        }
        no_groups = {f.name: None for f in dataclasses.fields(shards) if f.name.endswith("_group")}
        return RankShare(dataclasses.replace(shards, **no_groups), written)


@contextmanager
def _fake_groups(parallel: ParallelConfig, rank: int) -> Iterator[groups.Topology]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    path = choose_device("auto", 0)
    real, excepthook = dist.new_group, sys.excepthook

    def fake(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "backend": "fake"})

    dist.init_process_group("fake", rank=rank, world_size=layout_size(parallel), store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", fake):
            topology = groups.initialize(parallel, path, seed=0, timeout_minutes=1)
            yield dataclasses.replace(topology, device=torch.device("meta"))
    finally:
        groups.shutdown()
        sys.excepthook = excepthook  # torch has put the rank's number into it
