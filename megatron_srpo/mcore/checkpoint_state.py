"""The state of a policy as Megatron's sharded tensors: the model's weights, and each kind of optimizer state.

The optimizer's flat slices are stored for each parameter with the parameter's own sharding (in "model space"): the fp32
main parameter, Adam's two moments, and every shadow. One mechanism serves all of them. It also avoids a bug of
Megatron's own optimizer checkpoint without Transformer Engine and Apex: there all parameters share one step counter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_srpo.mcore.groups import Topology
from megatron_srpo.mcore.lora import MARK, has_adapters
from megatron_srpo.mcore.model import unwrap
from megatron_srpo.mcore.optimizer import ParameterShard, ShardedOptimizer
from megatron_srpo.mcore.policy import Policy

MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIX = "optimizer."

Slice = tuple[ParameterShard, torch.Tensor]  # a slice of a parameter, and the tensor that holds its values
Entries = dict[torch.Tensor, Any]  # by model parameter: Megatron's ShardedTensor or ShardedTensorFactory


def kinds(policy: Policy) -> set[str]:
    """The kinds of optimizer state that a policy has: "main", the moments, and every shadow."""
    return {"main", *MOMENTS, *policy.shadows}


def optimizer_of(policy: Policy) -> ShardedOptimizer:
    """The optimizer of a policy that trains."""
    assert policy.optimizer is not None, "only a trainable policy has state to save"
    return policy.optimizer


def parameters(policy: Policy) -> Iterator[torch.nn.Parameter]:
    """The parameters that a checkpoint holds, which are those that are trained, on this rank; in the same order on all
    ranks of a data-parallel group."""
    for piece in policy.model:
        yield from (parameter for parameter in unwrap(piece).parameters() if parameter.requires_grad)


def slices(policy: Policy) -> dict[str, list[Slice]]:
    """This rank's slices and the tensors that hold them, by kind of state."""
    shards = list(optimizer_of(policy).shards())
    found: dict[str, list[Slice]] = {"main": [(shard, shard.main) for shard in shards]}
    for moment in MOMENTS:
        found[moment] = [(shard, shard.state[moment]) for shard in shards]
    for name, shadow in policy.shadows.items():
        found[name] = list(zip(shards, shadow.slices, strict=True))
    return found


def model_state(model: list[torch.nn.Module], topology: Topology) -> list[dict[str, Any]]:
    """Megatron's sharded state dict of every piece, without Transformer Engine's FP8 scales, which are pickles. With
    LoRA it has the adapters only."""
    metadata = {"dp_cp_group": topology.dp_cp_group, "singleton_local_shards": False}
    pieces = [unwrap(piece).sharded_state_dict(metadata=metadata) for piece in model]
    adapted = has_adapters(model)
    return [
        {
            key: entry
            for key, entry in piece.items()
            if not isinstance(entry, ShardedObject) and (MARK in key or not adapted)
        }
        for piece in pieces
    ]


def entries_of(state: list[dict[str, Any]]) -> Entries:
    """The entries of a `model_state`."""
    sharded, _ = extract_sharded_tensors_and_factories(state)
    return {entry.data: entry for entry in nested_values(sharded)}


def entry_of_kind(kind: str, entry: Any, tensor: torch.Tensor) -> Any:
    """The entry of one kind of state of a parameter, from the entry of its weights. `tensor` is written or filled."""
    replaced: dict[str, Any] = {"key": f"{PREFIX}{kind}.{entry.key}", "data": tensor}
    if not isinstance(entry, ShardedTensorFactory):
        replaced["dtype"] = torch.float32
    return dataclasses.replace(entry, **replaced)


def kind_state(kind: str, whole: Iterable[tuple[torch.Tensor, torch.Tensor]], entries: Entries) -> dict[str, Any]:
    """The sharded state dict of one kind of state, by index of the parameter. `whole` has the parameters in the model's
    order, with the tensor to write or to fill."""
    return {
        str(index): entry_of_kind(kind, entries[parameter], tensor) for index, (parameter, tensor) in enumerate(whole)
    }
