"""Moves the trainer's tensors to host memory while engines generate, and back into place afterwards.

It moves storages, not tensors: a parameter stays a view of its buffer, so that Megatron, the optimizer and the shadows
need not know about it. Gradients are not kept, because the next step starts from zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

Storage = torch.UntypedStorage


class HostOffload:
    """From the first move on it holds as much host memory as it frees on the device; for a GPU the memory is
    page-locked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: list[torch.Tensor] = []  # kept, because page-locked memory is slow to allocate

    @contextmanager
    def on_host(self, kept: Iterable[torch.Tensor], dropped: Iterable[torch.Tensor]) -> Iterator[None]:
        """Inside this block the tensors have no memory on the device and must not be used. Afterwards `kept` have their
        values back, and `dropped` are zero."""
        keeping, dropping = self._storages(kept), self._storages(dropped)
        sizes = [(storage, storage.nbytes()) for storage in [*keeping, *dropping]]
        for copy, storage in zip(self._room(keeping), keeping, strict=True):
            copy.copy_(_bytes(storage), non_blocking=True)
        self._release([*keeping, *dropping])
        try:
            yield
        finally:
            for storage, size in sizes:
                storage.resize_(size)
            for storage in dropping:
                _bytes(storage).zero_()
            for copy, storage in zip(self._room(keeping), keeping, strict=True):
                _bytes(storage).copy_(copy, non_blocking=True)
            self._synchronize()

    def _storages(self, tensors: Iterable[torch.Tensor]) -> list[Storage]:
        """The distinct storages on the device, in order."""
        found: dict[int, Storage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == self._device.type and storage.nbytes():
                found.setdefault(storage.data_ptr(), storage)
        return list(found.values())

    def _room(self, storages: list[Storage]) -> list[torch.Tensor]:
        """Host memory for each storage."""
        for index, storage in enumerate(storages):
            if index == len(self._copies) or self._copies[index].numel() != storage.nbytes():
                room = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                self._copies[index : index + 1] = [room]
        return self._copies[: len(storages)]

    def _release(self, storages: list[Storage]) -> None:
        self._synchronize()  # the copies must be complete
        for storage in storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or torch would keep the memory in its cache

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _bytes(storage: Storage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
