"""Checkpoints of model, optimizer and shadows in Megatron's sharded format, readable at any other layout.

The optimizer's flat slices are stored per parameter with the parameter's own sharding (in "model space"): fp32 main
parameter, Adam's two moments, and every shadow. That is one mechanism for all of them, and it avoids the traps of
Megatron's own optimizer checkpoint where neither Transformer Engine nor Apex is installed (one shared step counter).
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_srpo.mcore.model import unwrap
from megatron_srpo.mcore.optimizer import ParameterShard
from megatron_srpo.mcore.policy import Policy

_MOMENTS = ("exp_avg", "exp_avg_sq")


def _parameters(policy: Policy) -> Iterator[torch.nn.Parameter]:
    for piece in policy.model:
        yield from unwrap(piece).parameters()


def _slices(policy: Policy) -> dict[str, list[tuple[ParameterShard, torch.Tensor]]]:
    """By kind of state: this rank's slices and the tensors that hold them."""
    shards = list(policy.optimizer.shards())
    kinds = {"main": [(shard, shard.main.data) for shard in shards]}
    for moment in _MOMENTS:
        kinds[moment] = [(shard, shard.state[moment]) for shard in shards]
    for name, shadow in policy.shadows.items():
        kinds[name] = list(zip(shards, shadow.slices, strict=True))
    return kinds


def _whole(policy: Policy, held: list[tuple[ParameterShard, torch.Tensor]], *, fill: bool) -> dict[Any, torch.Tensor]:
    """Whole fp32 tensors by model parameter, put together over the data-parallel ranks when `fill`."""
    mine = {shard.parameter: (shard, tensor) for shard, tensor in held}
    whole = {}
    for parameter in _parameters(policy):
        tensor = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if fill:
            if parameter in mine:
                shard, values = mine[parameter]
                tensor.view(-1)[shard.start : shard.stop] = values.detach()
            if policy.topology.dp_cp_group.size() > 1:
                dist.all_reduce(tensor, group=policy.topology.dp_cp_group)
        whole[parameter] = tensor
    return whole


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    """Megatron's sharded state dict of the model and, by kind of state and index of the parameter, of the rest."""
    metadata = {"dp_cp_group": policy.topology.dp_cp_group, "singleton_local_shards": False}
    state: dict[str, Any] = {"model": [unwrap(piece).sharded_state_dict(metadata=metadata) for piece in policy.model]}
    if policy.optimizer is None:
        return state
    sharded, _ = extract_sharded_tensors_and_factories(state["model"])
    by_parameter = {entry.data: entry for entry in nested_values(sharded)}
    for kind, held in _slices(policy).items():
        whole = _whole(policy, held, fill=not loading)
        state[kind] = {}
        for index, parameter in enumerate(_parameters(policy)):
            entry = by_parameter[parameter]
            replaced = {"key": f"optimizer.{kind}.{entry.key}", "data": whole[parameter]}
            if not isinstance(entry, ShardedTensorFactory):
                replaced["dtype"] = torch.float32
            state[kind][str(index)] = dataclasses.replace(entry, **replaced)
    return state


def save(policy: Policy, directory: Path, extra: dict[str, Any]) -> None:
    """Write model, optimizer and shadows into `directory` (made here, must be new or empty); all ranks call it.

    `extra` (plain data, the same on every rank) comes back from `load`.
    """
    if policy.topology.is_driver:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=policy.topology.control_group)
    if policy.optimizer is not None and not any("exp_avg" in s.state for s in policy.optimizer.shards()):
        policy.optimizer.restore_adam(0)  # before the first step torch's Adam has no state yet
    state = _sharded_state(policy, loading=False)
    state["progress"] = {"steps": policy.steps, "adam_steps": policy.optimizer.adam_steps(), "extra": extra}
    with _writers_spared():
        dist_checkpointing.save(state, str(directory))


@contextmanager
def _writers_spared() -> Iterator[None]:
    """Processes that are started inside do not hear SIGINT and SIGTERM, which torchrun sends to all of a rank's group:
    Megatron's writer keeps such a process from one checkpoint to the next, and a clean stop needs it for the last."""
    resource_tracker.ensure_running()  # its own start, inside, would unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load(policy: Policy, directory: Path) -> dict[str, Any]:
    """Restore what `save` wrote, at this layout; returns `extra`. All ranks call it."""
    if policy.optimizer is not None:
        policy.optimizer.restore_adam(0)
    state = _sharded_state(policy, loading=True)
    loaded = dist_checkpointing.load(state, str(directory))
    for piece, weights in zip(policy.model, loaded["model"], strict=True):
        unwrap(piece).load_state_dict(weights)
    if policy.optimizer is None:
        return loaded.get("progress", {}).get("extra", {})
    progress = loaded["progress"]
    policy.steps = progress["steps"]
    policy.optimizer.restore_adam(progress["adam_steps"])
    parameters = list(_parameters(policy))
    for kind, held in _slices(policy).items():
        by_parameter = {parameters[int(i)]: tensor for i, tensor in loaded[kind].items()}
        for shard, target in held:
            target.copy_(by_parameter[shard.parameter].reshape(-1)[shard.start : shard.stop])
    policy.optimizer.publish_main_to_model()
    return progress["extra"]
