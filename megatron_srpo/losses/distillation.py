"""The SDPO branch: divergence from the self-teacher on the student's top-k and a tail, and its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_srpo.losses.policy import LOG_RATIO_BOUND
from megatron_srpo.losses.vocab_parallel import _times

LARGEST_LOG_MASS = -1e-7  # the k ids together never count for more than this, so that the tail's log stays finite


def with_tail(logprobs: Tensor) -> Tensor:
    """Append the log of the remaining mass: [T, K] → [T, K+1]; log(1 − Σ exp) as log(−expm1(logsumexp))."""
    mass = torch.logsumexp(logprobs, -1, keepdim=True).clamp(max=LARGEST_LOG_MASS)
    return torch.cat([logprobs, torch.log(-torch.expm1(mass))], -1)


def topk_divergence(student_logp: Tensor, teacher_logp: Tensor, alpha: float, *, tail: bool) -> Tensor:
    """Divergence of SDPO on K ids: [T, K] log-probs over the whole vocabulary, of both, at the same ids → [T], nats.

    tail: the remaining mass is one more entry; otherwise both are renormalised over the K ids. α as in
    `full_divergence`. The gradient flows into `student_logp`.
    """
    teacher_logp = teacher_logp.detach()
    if tail:
        logp, logq = with_tail(student_logp), with_tail(teacher_logp)
    else:
        logp, logq = student_logp.log_softmax(-1), teacher_logp.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    if alpha == 0.0:
        return _times(q, logq - logp).sum(-1)
    if alpha == 1.0:
        return _times(p, logp - logq).sum(-1)
    logm = torch.logaddexp(logp + math.log1p(-alpha), logq + math.log(alpha))
    return alpha * _times(q, logq - logm).sum(-1) + (1 - alpha) * _times(p, logp - logm).sum(-1)


@torch.no_grad()
def distill_ratio(logp: Tensor, old_logp: Tensor | None, clip: float) -> Tensor:
    """min(π_θ/π_old, clip) per token, without gradient; 1 when the policy has not moved or clip is 0 (off). [T]"""
    if old_logp is None or clip == 0.0:
        return torch.ones_like(logp)
    return (logp - old_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=clip)


def dynamic_weights(teacher_entropy: Tensor, beta: float) -> Tensor:
    """w̃ = exp(−β H) of the teacher's entropy H [T] (SRPO §3.2), not yet divided by its mean over the step."""
    return torch.exp(-beta * teacher_entropy)
