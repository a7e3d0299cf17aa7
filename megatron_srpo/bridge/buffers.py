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
    A GPU's allocator does the same by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[np.ndarray] = []  # a tensor on such an array holds a reference to it

    def take(self, size: int) -> torch.Tensor:
        """`size` bytes that no other tensor has."""
        if self._device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        counts = references(self._memory)
        idle = [memory for memory, count in zip(self._memory, counts, strict=True) if count == OURS_ALONE]
        fitting = min((memory for memory in idle if memory.size >= size), key=len, default=None)
        if fitting is None:
            self._memory = [memory for memory in self._memory if all(memory is not other for other in idle)]
            del idle
            fitting = np.empty(size, np.uint8)
            self._memory.append(fitting)
        return torch.from_numpy(fitting)[:size]
