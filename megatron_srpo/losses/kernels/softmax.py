"""Triton kernels over the rows of a logit shard [T, v]: softmax statistics in one read, the gradient in a read and a
write. One program a row; everything is computed in fp32.

Legend as in vocab_parallel.py: T tokens, v this rank's columns, M ids a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time
IDS = 128  # ids at a time: a larger tile takes minutes to compile, and 2048 × 2048 cannot be
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _statistics(logits, stride, width, tops, sums, sums_stride, scale, BLOCK: tl.constexpr):
    """Online: when the maximum moves from m to m', Σe and Σe·(x−m) move with it (see `combine_statistics`)."""
    row = tl.program_id(0).to(tl.int64)
    top = NEGATIVE_INFINITY
    mass, weighted = 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < width, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == NEGATIVE_INFINITY, 0.0, new_top)
        moved = tl.where(mass > 0, top - base, 0.0)
        factor = tl.exp(moved)
        weighted = factor * (weighted + moved * mass)
        mass = factor * mass
        shifted = x - base
        e = tl.exp(shifted)
        mass += tl.sum(e, 0)
        weighted += tl.sum(tl.where(e == 0, 0.0, e * shifted), 0)
        top = new_top
    tl.store(tops + row, tl.where(top == NEGATIVE_INFINITY, 0.0, top))
    tl.store(sums + row * sums_stride, mass)
    tl.store(sums + row * sums_stride + 1, weighted)


def statistics(logits: Tensor, sums: Tensor, scale: float) -> Tensor:
    """Each row's largest x = scale · logit, m [T] fp32 (0 where all are −inf), and Σ e^(x−m), Σ e^(x−m)·(x−m) into
    sums[:, :2]."""
    tokens, width = logits.shape
    tops = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    _statistics[(tokens,)](logits, logits.stride(0), width, tops, sums, sums.stride(0), scale, BLOCK=BLOCK, num_warps=8)
    return tops


@triton.jit
def _softmax_gradient(
    logits, stride, out, out_stride, width, normalisers, entropies, slopes, entropy_slopes, scale, BLOCK: tl.constexpr
):
    """−p · (Σ of the log-probs' gradients + gradient of the entropy · (log p + H)), times `scale`."""
    row = tl.program_id(0).to(tl.int64)
    normaliser = tl.load(normalisers + row)
    entropy = tl.load(entropies + row)
    slope = tl.load(slopes + row)
    entropy_slope = tl.load(entropy_slopes + row)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < width, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        logp = x - normaliser
        p = tl.exp(logp)
        gradient = tl.where(p == 0, 0.0, -p * (slope + entropy_slope * (logp + entropy)))
        tl.store(out + row * out_stride + at, (gradient * scale).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _gradient_at_ids(
    out, out_stride, columns, here, logprobs, gradients, count,
    entropies, slopes, entropy_slopes, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the whole gradient at the ids that log-probs were asked for; an id that occurs twice gets both parts. Ids
    are compared with ids in tiles of BLOCK × BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    entropy = tl.load(entropies + row)
    slope, entropy_slope = tl.load(slopes + row), tl.load(entropy_slopes + row)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        asked = at < count
        column = tl.load(columns + row * count + at, mask=asked, other=-1)
        mine = tl.load(here + row * count + at, mask=asked, other=0) != 0
        logp = tl.load(logprobs + row * count + at, mask=asked, other=0.0)
        added = tl.zeros([BLOCK], tl.float32)
        for other in range(0, count, BLOCK):
            there = other + tl.arange(0, BLOCK)
            inside = there < count
            twin = tl.load(columns + row * count + there, mask=inside, other=-1)
            twins = tl.load(here + row * count + there, mask=inside, other=0) != 0
            given = tl.load(gradients + row * count + there, mask=inside, other=0.0)
            both = (column[:, None] == twin[None, :]) & twins[None, :]
            added += tl.sum(tl.where(both, given[None, :], 0.0), 1)
        p = tl.exp(logp)
        gradient = added - tl.where(p == 0, 0.0, p * (slope + entropy_slope * (logp + entropy)))
        tl.store(out + row * out_stride + column, (gradient * scale).to(out.dtype.element_ty), mask=mine)


def write_gradient(
    logits: Tensor, out: Tensor, normaliser: Tensor, entropy: Tensor, columns: Tensor, here: Tensor, logprobs: Tensor,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """The gradient of the logits [T, v] into `out` [T, v], which may be the logits themselves.

    normaliser, entropy [T], columns, here, logprobs [T, M] as the forward pass left them; grad_logprobs [T, M] or None,
    grad_entropy [T] or None.
    """
    tokens, width = logits.shape
    zeros = torch.zeros_like(normaliser)
    slopes = zeros if grad_logprobs is None else grad_logprobs.sum(1)
    entropy_slopes = zeros if grad_entropy is None else grad_entropy.contiguous()
    _softmax_gradient[(tokens,)](
        logits, logits.stride(0), out, out.stride(0), width, normaliser, entropy, slopes, entropy_slopes, scale,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    if grad_logprobs is None:
        return
    count = columns.size(1)
    _gradient_at_ids[(tokens,)](
        out, out.stride(0), columns.contiguous(), here.to(torch.int8), logprobs.contiguous(),
        grad_logprobs.contiguous(), count, entropy, slopes, entropy_slopes, scale,
        BLOCK=min(IDS, max(16, triton.next_power_of_2(count))),
    )  # fmt: skip
