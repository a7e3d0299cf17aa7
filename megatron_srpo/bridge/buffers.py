"""Reuses memory of an export's buckets, of what a server receives, and of a layer's weight until it is packed."""

from __future__ import annotations

import sys

import numpy as np
import torch


def references(arrays: list[np.ndarray]) -> list[int]:
    """The reference count of each array, which includes the references of the list and of this function."""
    return [sys.getrefcount(array) for array in arrays]


OURS_ALONE = references([np.empty(0)])[0]


class Buffers:
    """On a CPU it reuses a buffer once no tensor refers to it, because new memory pages cost more than the copy into
    them, and keeps at most one more idle buffer. On a GPU torch's allocator does the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[np.ndarray] = []  # a tensor that uses an array holds a reference to it

    def take(self, size: int) -> torch.Tensor:
        """`size` bytes that no other tensor uses."""
        if self._device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        counts = references(self._memory)
        used = [memory for memory, count in zip(self._memory, counts, strict=True) if count > OURS_ALONE]
        idle = [memory for memory, count in zip(self._memory, counts, strict=True) if count == OURS_ALONE]
        idle.sort(key=len)
        taken = next((memory for memory in idle if memory.size >= size), None)
        spare = [memory for memory in idle if memory is not taken][-1:]
        if taken is None:
            self._memory, idle, spare = used, [], []  # free the buffers that are too small
            taken = np.empty(size, np.uint8)
        self._memory = [*used, *spare, taken]
        return torch.from_numpy(taken)[:size]
