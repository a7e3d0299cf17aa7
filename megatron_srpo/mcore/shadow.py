"""A second set of weights that shares the model: the self-teacher, or the reference policy.

Only this data-parallel rank's fp32 slices are kept, in the optimizer's own sharding. To use the weights they are
swapped into the parameters for the time of a `with` block and swapped back, whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_srpo.mcore.optimizer import ShardedOptimizer


class WeightShadow:
    """Weights beside the model's, starting as a copy of them."""

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        self._optimizer = optimizer
        self.slices = [shard.main.detach().clone() for shard in optimizer.shards()]

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """shadow ← (1 − rate)·shadow + rate·student (SDPO's EMA teacher)."""
        for mine, shard in zip(self.slices, self._optimizer.shards(), strict=True):
            mine.lerp_(shard.main.detach(), rate)

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, shard in zip(self.slices, self._optimizer.shards(), strict=True):
            held = shard.main.detach().clone()
            shard.main.data.copy_(mine)
            mine.copy_(held)
        self._optimizer.publish_main_to_model()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model computes with these weights; afterwards the student is back, bit for bit
        (the model's parameters are always its main parameters rounded to the model's dtype)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
