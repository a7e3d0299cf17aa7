"""Saves and restores all random generators of a rank, as plain values that torch loads without running code."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def seed(value: int) -> None:
    """Seed the generators of Python, NumPy and torch (CPU). Megatron's generators are seeded with its groups."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def states() -> dict[str, Any]:
    """The states of the generators of Python, NumPy and torch (CPU and this rank's GPU), and of Megatron's, by name."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def restore(saved: dict[str, Any]) -> None:
    """Set all generators to the states that `states` returned."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    get_cuda_rng_tracker().set_states(saved["megatron"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
