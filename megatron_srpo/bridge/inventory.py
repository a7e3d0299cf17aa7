"""What an export of one pipeline stage would contain, computed from the shapes of one rank, without weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.export import Exporter
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig


@dataclass(frozen=True)
class StageInventory:
    """The full Hugging Face tensors of one stage, and the buckets that gather them."""

    tensors: dict[str, tuple[int, ...]]
    buckets: list[int]  # size of each, gathered, in bytes


def stage_inventory(shards: ModelShards, hf_config: HfConfig) -> StageInventory:
    """`shards` are those of any rank of the stage, and may be on the meta device. Raises BridgeError for a parameter
    without a rule, and for a tensor that two parameters give."""
    exporter = Exporter(dataclasses.replace(shards, pp_rank=0, pp_size=1, pp_group=None), hf_config)
    tensors: dict[str, tuple[int, ...]] = {}
    buckets = []
    for bucket in exporter.buckets:
        buckets.append(sum(part.nbytes * part.copies for part in bucket))
        for part in bucket:
            split = part.copies // len(part.mapped)  # ranks that share the tensor
            for mapped in part.mapped:
                for name, shape in zip(mapped.hf_names, mapped.rule.hf_shapes(part.shape, split), strict=True):
                    if name in tensors:
                        raise BridgeError(f"{name}: two parameters of one stage give it, {part.name} is the second")
                    tensors[name] = shape
    return StageInventory(tensors, buckets)
