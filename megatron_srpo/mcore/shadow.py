"""A second set of weights that shares the model: the self-teacher, or the reference policy.

Only this data-parallel rank's fp32 slices are kept, in the optimizer's own sharding. To use them they are written over
the model's parameters for the time of a `with` block; the student comes back from the optimizer's main parameters,
whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from megatron_srpo.mcore.optimizer import ParameterShard, ShardedOptimizer

EXCHANGED = 2**22  # numbers at a time


class WeightShadow:
    """Weights beside the model's, starting as a copy of them. `offload`: in host memory, page-locked beside a GPU; they
    then travel to the device and back one slice at a time."""

    def __init__(self, optimizer: ShardedOptimizer, *, offload: bool = False) -> None:
        self._optimizer = optimizer
        self.slices = [_copy(shard.main.detach(), offload) for shard in optimizer.shards()]

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """shadow ← (1 − rate)·shadow + rate·student (SDPO's EMA teacher)."""
        for mine, shard in zip(self.slices, self._optimizer.shards(), strict=True):
            here = mine.to(shard.main.device)  # itself, unless it is offloaded
            here.lerp_(shard.main.detach(), rate)
            if here is not mine:
                mine.copy_(here)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model computes with these weights; afterwards the student is back, bit for bit
        (the model's parameters are always its main parameters rounded to the model's dtype), whatever fails inside or
        on the way there."""
        with ExitStack() as leaving:
            leaving.callback(self._optimizer.gather_model)  # the last of the callbacks
            for mine, shard in zip(self.slices, self._optimizer.shards(), strict=True):
                _show(mine, shard)
                leaving.callback(_restore, mine, shard)
            self._optimizer.gather_model()
            yield


@torch.no_grad()
def _show(mine: torch.Tensor, shard: ParameterShard) -> None:
    if _same_memory(shard):
        _exchange(mine, shard.main.data)
    elif mine.device == shard.model.device:
        shard.model.copy_(mine)
    else:  # rounded on the device: a copy between devices would round on the host, ten times slower than the link
        for ours, theirs in zip(mine.split(EXCHANGED), shard.model.split(EXCHANGED), strict=True):
            theirs.copy_(ours.to(theirs.device, non_blocking=True))


@torch.no_grad()
def _restore(mine: torch.Tensor, shard: ParameterShard) -> None:
    if _same_memory(shard):
        _exchange(mine, shard.main.data)
    else:
        shard.model.copy_(shard.main)


def _same_memory(shard: ParameterShard) -> bool:
    """An fp32 model's parameters are the optimizer's main ones."""
    return shard.main.data_ptr() == shard.model.data_ptr()


def _exchange(some: torch.Tensor, others: torch.Tensor) -> None:
    """Swap the values of two flat tensors, a piece at a time: no second copy of either exists."""
    held = torch.empty_like(others[:EXCHANGED])  # before anything has moved: there may be no memory for it
    for one, other in zip(some.split(EXCHANGED), others.split(EXCHANGED), strict=True):
        held[: other.numel()].copy_(other)
        other.copy_(one)
        one.copy_(held[: other.numel()])


def _copy(weights: torch.Tensor, offload: bool) -> torch.Tensor:
    if not offload or weights.device.type == "cpu":
        return weights.clone()
    return torch.empty(weights.shape, dtype=weights.dtype, device="cpu", pin_memory=True).copy_(weights)
