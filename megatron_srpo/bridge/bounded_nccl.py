"""An NCCL group whose lost rank is an error of that group alone.

torch's wait() of an NCCL operation returns at once: only the GPU's stream waits. A watchdog thread of the group ends
the whole process when an operation takes too long. Here the group has no watchdog. The caller waits for the operation
itself, up to a limit, and then aborts this group and no other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"  # torch starts no watchdog for a group that is made while it is 1
LOOK_SECONDS = 0.0001


class BoundedNccl:
    """Broadcasts from rank 0. Making one returns when all ranks take part, and raises RuntimeError if they do not
    within `timeout`."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> None:
        self._seconds = timeout.total_seconds()
        with _without_watchdog():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        # NCCL connects its ranks in their first operation, in which it would wait without a limit for one that is gone.
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)], timeout)
        first = dist.BroadcastOptions()
        first.rootRank = first.rootTensor = 0
        self.broadcast([torch.zeros(1, device=device)], first).wait()

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> BoundedWork:
        """Start a broadcast. The limit counts from here."""
        work = self._group.broadcast(tensors, options)  # type: ignore[attr-defined]  # torch has no type for it
        return BoundedWork(self._group, work, self._seconds)


class BoundedWork:
    """An operation under way."""

    def __init__(self, group: dist.ProcessGroupNCCL, work: dist.Work, seconds: float) -> None:
        self._group, self._work = group, work
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def wait(self) -> None:
        """Returns when the operation is complete on the device. Raises RuntimeError, and aborts the group, when it
        fails or takes too long."""
        try:
            while not self._work.is_completed():
                if time.monotonic() > self._deadline:
                    raise RuntimeError(f"timed out: no answer for {self._seconds:g} s")
                time.sleep(LOOK_SECONDS)
            self._work.wait()  # raises what NCCL found
        except RuntimeError:
            self._group.abort()
            raise


@contextmanager
def _without_watchdog() -> Iterator[None]:
    before = os.environ.get(BLOCKING_WAIT)
    os.environ[BLOCKING_WAIT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BLOCKING_WAIT]
        else:
            os.environ[BLOCKING_WAIT] = before
