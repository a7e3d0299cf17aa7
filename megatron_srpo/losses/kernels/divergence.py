"""Triton kernels of the divergence of two logit shards [T, v], both × `scale`: its local sums in one read of both, its
gradient in one read of both and one write. One program a row; fp32. The formulas stand in vocab_parallel.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _times(weight, values):
    return tl.where(weight == 0, 0.0, weight * values)


@triton.jit
def _terms(logp, logq, alpha, log_alpha, log_rest, KIND: tl.constexpr):
    """An entry's term of the divergence, and p · its derivative by p. KIND 0: KL(q‖p), 1: KL(p‖q), 2: between."""
    p, q = tl.exp(logp), tl.exp(logq)
    if KIND == 0:
        return _times(q, logq - logp), -q
    if KIND == 1:
        term = _times(p, logp - logq)
        return term, term
    a, b = logp + log_rest, logq + log_alpha
    high = tl.maximum(a, b)
    high = tl.where(high == NEGATIVE_INFINITY, 0.0, high)
    logm = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
    from_p = (1 - alpha) * _times(p, logp - logm)
    return alpha * _times(q, logq - logm) + from_p, from_p


@triton.jit
def _sums(
    student, student_stride, teacher, teacher_stride, width, normalisers, tokens, totals,
    scale, alpha, log_alpha, log_rest, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    norm_p, norm_q = tl.load(normalisers + row), tl.load(normalisers + tokens + row)
    total, slopes = 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(student + row * student_stride + at, mask=inside, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        y = tl.load(teacher + row * teacher_stride + at, mask=inside, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        value, slope = _terms(x - norm_p, y - norm_q, alpha, log_alpha, log_rest, KIND)
        total += tl.sum(tl.where(inside, value, 0.0), 0)
        slopes += tl.sum(tl.where(inside, slope, 0.0), 0)
    tl.store(totals + row * 2, total)
    tl.store(totals + row * 2 + 1, slopes)


@triton.jit
def _gradient(
    student, student_stride, teacher, teacher_stride, out, out_stride, width, normalisers, tokens, slope_sums, given,
    scale, alpha, log_alpha, log_rest, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    norm_p, norm_q = tl.load(normalisers + row), tl.load(normalisers + tokens + row)
    slope_sum, grad = tl.load(slope_sums + row), tl.load(given + row)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(student + row * student_stride + at, mask=inside, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        y = tl.load(teacher + row * teacher_stride + at, mask=inside, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        logp = x - norm_p
        _value, slope = _terms(logp, y - norm_q, alpha, log_alpha, log_rest, KIND)
        gradient = (slope - tl.exp(logp) * slope_sum) * (grad * scale)
        tl.store(out + row * out_stride + at, gradient.to(out.dtype.element_ty), mask=inside)


def _constants(alpha: float, scale: float) -> dict[str, float | int]:
    kind = {0.0: 0, 1.0: 1}.get(alpha, 2)
    between = kind == 2
    return {
        "scale": scale,
        "alpha": alpha,
        "log_alpha": math.log(alpha) if between else 0.0,
        "log_rest": math.log1p(-alpha) if between else 0.0,
        "KIND": kind,
        "BLOCK": BLOCK,
        "num_warps": 8,
    }


def divergence_sums(student: Tensor, teacher: Tensor, normalisers: Tensor, alpha: float, scale: float) -> Tensor:
    """[T, 2] fp32: this shard's part of the divergence and of Σ p·∂D/∂p. normalisers [2, T]: log Σ e^x of student and
    teacher, × scale, over the whole vocabulary."""
    tokens, width = student.shape
    totals = torch.empty(tokens, 2, dtype=torch.float32, device=student.device)
    _sums[(tokens,)](
        student, student.stride(0), teacher, teacher.stride(0), width, normalisers.contiguous(), tokens, totals,
        **_constants(alpha, scale),
    )  # fmt: skip
    return totals


def divergence_gradient(
    student: Tensor, teacher: Tensor, normalisers: Tensor, slope_sums: Tensor, given: Tensor, alpha: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of the student's logits [T, v] in their dtype; `slope_sums` [T] summed over all shards, `given` [T]."""
    tokens, width = student.shape
    out = torch.empty_like(student)
    _gradient[(tokens,)](
        student, student.stride(0), teacher, teacher.stride(0), out, out.stride(0), width, normalisers.contiguous(),
        tokens, slope_sums.contiguous(), given.contiguous(), **_constants(alpha, scale),
    )  # fmt: skip
    return out
