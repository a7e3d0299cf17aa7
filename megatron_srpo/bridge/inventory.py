"""What an export of one pipeline stage would contain, from the shapes of one rank: no weights, no communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.export import Exporter
from megatron_srpo.core.tensors import ModelShards


@dataclass(frozen=True)
class StageInventory:
    """Full Hugging Face tensors of one stage, and the messages that gather them."""

    tensors: dict[str, tuple[int, ...]]
    buckets: list[int]  # bytes of each, gathered


def stage_inventory(shards: ModelShards, hf_config: Mapping[str, Any]) -> StageInventory:
    """`shards` of any rank of the stage, also on the meta device. Raises BridgeError for a parameter without a rule,
    and for a tensor that two parameters give."""
    exporter = Exporter(dataclasses.replace(shards, pp_rank=0, pp_size=1, pp_group=None), hf_config)
    tensors: dict[str, tuple[int, ...]] = {}
    buckets = []
    for bucket in exporter._buckets:
        buckets.append(sum(part.nbytes * part.copies for part in bucket))
        for part in bucket:
            split = part.copies // len(part.mapped)  # ranks that share the tensor
            for mapped in part.mapped:
                for name, shape in zip(mapped.hf_names, mapped.rule.hf_shapes(part.shape, split), strict=True):
                    if name in tensors:
                        raise BridgeError(f"{name}: two parameters of one stage give it, {part.name} is the second")
                    tensors[name] = shape
    return StageInventory(tensors, buckets)
