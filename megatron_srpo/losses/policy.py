"""The GRPO branch: clipped policy gradient per token, the KL to a reference, and the rollout correction.

All tensors are [T]. Log-ratios are clamped before `exp`; the caller replaces values outside the loss mask beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

LOG_RATIO_BOUND = 20.0


def _ratio(logp: Tensor, other: Tensor) -> Tensor:
    return (logp - other).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward pass is an all-reduce too: every rank of the group uses the sum in its own loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sequence_mean(values: Tensor, mask: Tensor, cu_seqlens: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Mean of `values` over the masked tokens of each sequence, at every token of the sequence; 0 where it has none.

    `group`: the ranks that hold the other parts of the same sequences (context parallel).
    """
    positions = torch.arange(mask.numel(), device=mask.device)
    sequence = torch.bucketize(positions, cu_seqlens[1:].to(positions.dtype), right=True)
    empty = torch.zeros(2, cu_seqlens.numel(), dtype=values.dtype, device=values.device)
    sums = empty.index_add(1, sequence, torch.stack([values * mask, mask.to(values.dtype)]))
    if group is not None:
        sums = _SumOverRanks.apply(sums, group)
    return (sums[0] / sums[1].clamp(min=1))[sequence]


def policy_loss(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """ℓ = −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)·A), and whether the clip was active (GRPO; DAPO's clip-higher).

    log_ratio: log ρ = log π_θ − log π_old, per token, or its mean over the sequence (GSPO, arXiv 2507.18071). dual_clip
    c > 1 bounds the loss by −c·A where A < 0.
    """
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    plain = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(plain, bounded)
    clipped = bounded < plain
    if dual_clip > 0:
        floor = dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
    return -objective, clipped


def k3(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π‖π_ref) from a sampled token: r − 1 − log r, r = π_ref/π; never negative."""
    log_ratio = (reference_logp - logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio.exp() - 1 - log_ratio


@torch.no_grad()
def rollout_weights(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    group: ProcessGroup | None = None,
    *,
    mode: str,
    cap: float,
) -> Tensor:
    """Importance weights of the trainer's policy against the engine's, π_old/π_roll, without gradient.

    off: 1. truncate: min(r, cap). mask: r where r ≤ cap, else 0. sequence_mask: r truncated, and 0 for every token of
    a sequence whose geometric mean ratio over its response tokens leaves [1/cap, cap]. `mask` [T] marks response
    tokens, `cu_seqlens` [S+1] the sequences, `group` the ranks that hold their other parts.
    """
    if mode == "off":
        return torch.ones_like(old_logp)
    ratio = _ratio(old_logp, rollout_logp)
    if mode == "truncate":
        return ratio.clamp(max=cap)
    if mode == "mask":
        return torch.where(ratio > cap, torch.zeros_like(ratio), ratio)
    assert mode == "sequence_mask", mode
    mean = sequence_mean(ratio.log(), mask, cu_seqlens, group)
    limit = torch.tensor(cap, dtype=ratio.dtype, device=mask.device).log().abs()
    return torch.where(mean.abs() > limit, torch.zeros_like(ratio), ratio.clamp(max=cap))
