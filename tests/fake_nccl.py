"""An NCCL process group over gloo, for machines without a GPU."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.distributed as dist

PATIENCE = 30


class FakeNccl:
    """Takes the place of torch.distributed.ProcessGroupNCCL, and has its manners: ranks connect in the first operation,
    which waits for as long as it takes; wait() returns at once and never raises; without a watchdog nothing notices a
    lost rank. `launched` has what each rank has broadcast, in order: (dtype, number of elements)."""

    class Options:
        _timeout = None

    aborted: ClassVar[list[FakeNccl]] = []
    made: ClassVar[list[FakeNccl]] = []

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == "1", "its watchdog would end the process"
        assert isinstance(options._timeout, timedelta)
        self.rank, self.size, self._store = rank, size, store
        self._gloo: dist.ProcessGroupGloo | None = None
        self.launched: list[tuple[torch.dtype, int]] = []
        self.made.append(self)

    def _connected(self) -> dist.ProcessGroupGloo:
        if self._gloo is None:
            gloo = dist.ProcessGroupGloo._Options()
            gloo._timeout, gloo._threads = timedelta(seconds=PATIENCE), 2
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._gloo = dist.ProcessGroupGloo(self._store, self.rank, self.size, gloo)
        return self._gloo

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> SimpleNamespace:
        (tensor,) = tensors  # NCCL takes several of one device; we send one
        assert tensor.is_contiguous() and (options.rootRank, options.rootTensor) == (0, 0)
        self.launched.append((tensor.dtype, tensor.numel()))
        work = self._connected().broadcast(tensors, options)
        return SimpleNamespace(is_completed=lambda: work.is_completed() and work.is_success(), wait=lambda: None)

    def abort(self) -> None:
        self.aborted.append(self)
