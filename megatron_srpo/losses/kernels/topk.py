"""Triton kernel: which of equal logits are among the k largest. One program a row; it reads no further than it must."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time


@triton.jit
def _lowest_of_equals(logits, stride, width, cuts, tied, above, columns, columns_stride, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cut = tl.load(cuts + row)
    place = tl.load(above + row).to(tl.int32)
    stop = tl.where(tl.load(tied + row) != 0, width, 0)
    start = 0
    while (start < stop) & (place < k):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        equal = (tl.load(logits + row * stride + at, mask=inside, other=0.0) == cut) & inside
        target = place + tl.cumsum(equal.to(tl.int32), 0) - 1
        tl.store(columns + row * columns_stride + target, at.to(tl.int64), mask=equal & (target < k))
        place += tl.sum(equal.to(tl.int32), 0)
        start += BLOCK


def lowest_of_equals(logits: Tensor, cuts: Tensor, tied: Tensor, above: Tensor, columns: Tensor, k: int) -> None:
    """In rows that are `tied` [T], the lowest columns whose logit equals `cuts` [T] into columns[:, above:k], int64;
    `above` [T]: how many are larger."""
    tokens, width = logits.shape
    _lowest_of_equals[(tokens,)](
        logits, logits.stride(0), width, cuts.contiguous(), tied.to(torch.int8), above.contiguous(),
        columns, columns.stride(0), k, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
