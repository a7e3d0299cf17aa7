"""The processes that share a conversion: one, or those that torchrun started. They meet at torchrun's store alone."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # another process may have far more to convert; one that fails is ended by torchrun


class Team:
    """This process among `size`. All make the same calls in the same order."""

    def __init__(self) -> None:
        self.rank, self.size, self._store, self._calls = 0, 1, None, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch.distributed as dist

            self._store, self.rank, self.size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share_of(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part."""
        return work[self.rank :: self.size]

    def collect(self, mine: T) -> list[T]:
        """What every process brings, by rank, on every process; returns when all have called it."""
        if self._store is None:
            return [mine]
        self._calls += 1
        mine_is, seen_by = ([f"conversion/{kind}/{self._calls}/{rank}" for rank in range(self.size)] for kind in "ab")
        self._store.set(mine_is[self.rank], pickle.dumps(mine))
        self._await(mine_is)
        found: list[Any] = [pickle.loads(self._store.get(key)) for key in mine_is]
        self._store.set(seen_by[self.rank], b"")
        if self.leads:  # it may have the store, which ends with it
            self._await(seen_by)
        return found

    def _await(self, keys: list[str]) -> None:
        """The store's own wait would not see Ctrl-C."""
        while not self._store.check(keys):
            time.sleep(0.05)
