"""Keeps the optimizer's state in host memory and brings a part of it to the device where it is used.

As in host_offload.py storages are moved, not tensors: a main parameter or a moment stays the same tensor on the device,
whose storage is empty while the values are in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

PIECE = 2**28  # bytes of state that are on the device at a time, unless one parameter's slice is larger


class HostState:
    """Host memory for tensors, by tensor; page-locked if the tensors are on a GPU.

    All copies run on the device's current stream, in order with the kernels that use the tensors.
    """

    def __init__(self) -> None:
        self._copies: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy each tensor, which must fill its storage, to host memory, and free its memory on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            assert storage.nbytes() == tensor.nbytes, "the storage belongs to other tensors too"
            if tensor not in self._copies:
                pinned = tensor.device.type == "cuda"
                self._copies[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._copies[tensor].copy_(tensor.detach(), non_blocking=True)
            storage.resize_(0)  # the allocator gives it to later work of the same stream

    def forget(self, tensor: torch.Tensor) -> None:
        """Free the host memory of a tensor that nothing will use any more."""
        self._copies.pop(tensor, None)

    @contextmanager
    def present(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Inside this block these tensors have their values on the device. Changes are kept."""
        absent = [tensor for tensor in tensors if tensor in self._copies and not tensor.untyped_storage().nbytes()]
        for tensor in absent:
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.detach().copy_(self._copies[tensor], non_blocking=True)
        try:
            yield
        finally:
            self.leave(absent)
