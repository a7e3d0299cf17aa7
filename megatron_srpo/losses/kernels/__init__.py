"""Whether the Triton kernels serve a tensor: on NVIDIA GPUs, and on a CPU under TRITON_INTERPRET=1 (for tests).

The other modules of this package import Triton: import them only where `serve` returned True.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def serve(logits: Tensor) -> bool:
    """Whether the kernels compute on `logits`; otherwise the torch code next to each call does."""
    if logits.dtype not in DTYPES or not logits.numel() or not _installed():
        return False
    return logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
