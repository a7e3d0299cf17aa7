"""The trainer's tensors leave their device while engines generate, and come back in place.

What moves is storage: a parameter stays a view of its buffer and a main parameter a view of its own, so that Megatron,
the optimizer and the shadows find everything where it was. Gradients are not kept: the next step starts from zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

Storage = torch.UntypedStorage


class HostOffload:
    """Host memory, page-locked beside a GPU, is held from the first move on: as much as the device is relieved of."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: list[torch.Tensor] = []  # kept: page-locked memory is slow to get

    @contextmanager
    def on_host(self, kept: Iterable[torch.Tensor], dropped: Iterable[torch.Tensor]) -> Iterator[None]:
        """Inside the block the tensors have no memory on the device and must not be touched."""
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
        """The distinct ones on the device, in order."""
        found: dict[int, Storage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == self._device.type and storage.nbytes():
                found.setdefault(storage.data_ptr(), storage)
        return list(found.values())

    def _room(self, storages: list[Storage]) -> list[torch.Tensor]:
        """Host memory for each of them."""
        for index, storage in enumerate(storages):
            if index == len(self._copies) or self._copies[index].numel() != storage.nbytes():
                room = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                self._copies[index : index + 1] = [room]
        return self._copies[: len(storages)]

    def _release(self, storages: list[Storage]) -> None:
        self._synchronize()  # the copies are made
        for storage in storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or torch would keep it for itself

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _bytes(storage: Storage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
