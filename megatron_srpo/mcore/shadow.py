"""A second set of weights that shares the model: the self-teacher, or the reference policy.

Each data-parallel rank keeps its fp32 slices only, in the optimizer's own sharding. A `with` block writes them over the
model's parameters. At its end the student is restored from the optimizer's main parameters, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from megatron_srpo.mcore.optimizer import ParameterShard, ShardedOptimizer

EXCHANGED = 2**22  # how many numbers are copied at a time


class WeightShadow:
    """A second set of weights, which starts as a copy of the model's. With `offload` it is in host memory, page-locked
    if there is a GPU, and is copied to the device and back one slice at a time."""

    def __init__(self, optimizer: ShardedOptimizer, *, offload: bool = False) -> None:
        self._optimizer = optimizer
        self.slices = []
        for shard in optimizer.shards():
            with optimizer.present(shard.main):
                self.slices.append(_copy(shard.main.detach(), offload))

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """shadow ← (1 − rate)·shadow + rate·student (SDPO's EMA teacher)."""
        for mine, shard in zip(self.slices, self._optimizer.shards(), strict=True):
            here = mine.to(shard.main.device)  # the same tensor, unless it is offloaded
            with self._optimizer.present(shard.main):
                here.lerp_(shard.main.detach(), rate)
            if here is not mine:
                mine.copy_(here)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside this block the model computes with these weights. Afterwards the student's weights are restored bit
        for bit, also after an error: the model's parameters are always the main parameters rounded to the model's
        dtype."""
        with ExitStack() as leaving:
            leaving.callback(self._optimizer.gather_model)  # runs after the other callbacks
            for mine, shard in zip(self.slices, self._optimizer.shards(), strict=True):
                _show(mine, shard)
                leaving.callback(self._restore, mine, shard)
            self._optimizer.gather_model()
            yield

    @torch.no_grad()
    def _restore(self, mine: torch.Tensor, shard: ParameterShard) -> None:
        if _same_memory(shard):
            _exchange(mine, shard.main.data)
            return
        with self._optimizer.present(shard.main):
            shard.model.copy_(shard.main)


@torch.no_grad()
def _show(mine: torch.Tensor, shard: ParameterShard) -> None:
    if _same_memory(shard):
        _exchange(mine, shard.main.data)
    elif mine.device == shard.model.device:
        shard.model.copy_(mine)
    else:  # rounds on the device: a copy between devices would round on the host, ten times slower than the link
        for ours, theirs in zip(mine.split(EXCHANGED), shard.model.split(EXCHANGED), strict=True):
            theirs.copy_(ours.to(theirs.device, non_blocking=True))


def _same_memory(shard: ParameterShard) -> bool:
    """Whether the model's parameter is the optimizer's main parameter, as in an fp32 model."""
    return shard.main.data_ptr() == shard.model.data_ptr()


def _exchange(some: torch.Tensor, others: torch.Tensor) -> None:
    """Swap the values of two flat tensors piece by piece, without a whole copy of either."""
    held = torch.empty_like(others[:EXCHANGED])  # allocated first, because the allocation may fail
    for one, other in zip(some.split(EXCHANGED), others.split(EXCHANGED), strict=True):
        held[: other.numel()].copy_(other)
        other.copy_(one)
        one.copy_(held[: other.numel()])


def _copy(weights: torch.Tensor, offload: bool) -> torch.Tensor:
    if not offload or weights.device.type == "cpu":
        return weights.clone()
    return torch.empty(weights.shape, dtype=weights.dtype, device="cpu", pin_memory=True).copy_(weights)
