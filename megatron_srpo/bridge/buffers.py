"""Memory that is taken again: an export's buckets, what a server receives, a layer's weight until it is packed."""

from __future__ import annotations

import sys

import numpy as np
import torch


def references(arrays: list[np.ndarray]) -> list[int]:
    """How often each is referred to, by the list and the question itself too."""
    return [sys.getrefcount(array) for array in arrays]


OURS_ALONE = references([np.empty(0)])[0]


class Buffers:
    """On a CPU a buffer is taken again once no tensor is in it: pages that are fresh cost more than the copy into them.
    One more that is idle is kept. A GPU's allocator does the same by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[np.ndarray] = []  # a tensor on such an array holds a reference to it

    def take(self, size: int) -> torch.Tensor:
        """`size` bytes that no other tensor has."""
        if self._device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        counts = references(self._memory)
        used = [memory for memory, count in zip(self._memory, counts, strict=True) if count > OURS_ALONE]
        idle = [memory for memory, count in zip(self._memory, counts, strict=True) if count == OURS_ALONE]
        idle.sort(key=len)
        taken = next((memory for memory in idle if memory.size >= size), None)
        spare = [memory for memory in idle if memory is not taken][-1:]
        if taken is None:
            self._memory, idle, spare = used, [], []  # what is too small makes room
            taken = np.empty(size, np.uint8)
        self._memory = [*used, *spare, taken]
        return torch.from_numpy(taken)[:size]
