"""The processes that share a conversion: one, or those that torchrun started.

They exchange objects through torchrun's store. There is no process group, because Megatron's layouts are built on fake
process groups (mcore/meta_model.py), and a process can have one default group only.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from megatron_srpo.core import loopback

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # another process may have much more to convert; torchrun ends the job if one fails


class StoreGroup:
    """This process and the others. All of them make the same calls in the same order."""

    def __init__(self) -> None:
        self.rank, self.size, self._calls = 0, 1, 0
        self._store: dist.Store | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch.distributed as dist

            if loopback.is_one_machine():
                loopback.confine_stores()
            self._store, self.rank, self.size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def share_of(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part of the work."""
        return work[self.rank :: self.size]

    def gather(self, mine: T) -> list[T]:
        """The objects of all processes, in rank order, on every process. Returns when all have called it."""
        store = self._store
        if store is None:
            return [mine]
        self._calls += 1
        given, seen = ([f"conversion/{kind}/{self._calls}/{rank}" for rank in range(self.size)] for kind in "ab")
        store.set(given[self.rank], pickle.dumps(mine))  # type: ignore[arg-type]  # torch's stub knows str only
        _wait(store, given)
        found: list[T] = [pickle.loads(store.get(key)) for key in given]
        store.set(seen[self.rank], "")
        if self.is_leader:  # the store may live in this process, and ends with it
            _wait(store, seen)
        return found


def _wait(store: dist.Store, keys: Iterable[str]) -> None:
    """Wait for keys by polling: the store's own wait() cannot be interrupted by Ctrl-C."""
    while not store.check(list(keys)):
        time.sleep(0.05)
