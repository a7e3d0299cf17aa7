"""One objective for both branches (SRPO §3.3), on one packed row or a context-parallel rank's part of it.

    L = 1/N Σ_t [ policy_weight · (r_t ℓ_GRPO + c_KL·k3 − c_H·H) + distill_weight · w_t · ρ̄_t · r_t · ℓ_SDPO ]

N and the mean of the dynamic weights span the whole optimiser step and are given, so the sum over rows, however they
are split or spread, is the objective. r_t is the rollout correction, ρ̄_t SDPO's clipped ratio, w_t = exp(−βH)/mean. The
reference KL and the entropy bonus regularise the policy gradient and carry its weight: a row that is only distilled is
already held by its teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_srpo.config import AlgorithmConfig
from megatron_srpo.core.records import PackedBatch
from megatron_srpo.losses.grpo import k3, policy_loss, rollout_weights, sequence_mean
from megatron_srpo.losses.head import Head
from megatron_srpo.losses.sdpo import distill_ratio, dynamic_weights, topk_divergence
from megatron_srpo.losses.vocab_parallel import full_divergence


@dataclass(frozen=True)
class LossSettings:
    """The numbers of the objective; meanings in config.AlgorithmConfig. 0 switches dual_clip, distill_ratio_clip,
    kl_loss_coef and entropy_coef off."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    sequence_ratio: bool = False
    alpha: float = 0.5
    tail: bool = True
    distill_ratio_clip: float = 2.0
    beta: float = 1.0
    rollout_correction: str = "truncate"
    rollout_correction_cap: float = 2.0
    kl_loss_coef: float = 0.0
    entropy_coef: float = 0.0

    @classmethod
    def from_config(cls, algorithm: AlgorithmConfig) -> LossSettings:
        return cls(
            clip_low=algorithm.clip_ratio_low,
            clip_high=algorithm.clip_ratio_high,
            dual_clip=algorithm.dual_clip,
            sequence_ratio=algorithm.importance_ratio == "sequence",
            alpha=algorithm.divergence_alpha,
            tail=algorithm.distillation_tail,
            distill_ratio_clip=algorithm.distill_ratio_clip,
            beta=algorithm.beta,
            rollout_correction=algorithm.rollout_correction,
            rollout_correction_cap=algorithm.rollout_correction_cap,
            kl_loss_coef=algorithm.kl_loss_coef,
            entropy_coef=algorithm.entropy_coef,
        )


def _sum(values: Tensor, weight: Tensor) -> Tensor:
    """[Σ weight·values, Σ weight], detached: a mean that adds up over rows."""
    return torch.stack([(values.detach() * weight).sum(), weight.sum()])


class _Row:
    """A packed row with harmless values outside the loss mask, so that nothing there can become NaN."""

    def __init__(self, batch: PackedBatch, logp: Tensor) -> None:
        self.on = batch.loss_mask > 0
        self.batch = batch
        self.mask = batch.loss_mask
        self.logp = self.clean(logp)
        self.old = None if batch.old_logprobs is None else self.clean(batch.old_logprobs)
        self.behaviour = self.logp.detach() if self.old is None else self.old
        self.rollout = self.clean(batch.rollout_logprobs)

    def clean(self, values: Tensor) -> Tensor:
        return torch.where(self.on, values, torch.zeros_like(values))


def _distillation(
    row: _Row, head: Head, topk_logprobs: Tensor, settings: LossSettings, mean: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_t · ρ̄_t · ℓ_SDPO per token [T] before the rollout correction, and its metrics."""
    batch = row.batch
    distilled = row.on & (batch.distill_weight > 0)
    weight = distilled.to(row.logp.dtype)
    if batch.teacher_logits is not None:
        divergence = full_divergence(
            head.logits(), batch.teacher_logits, settings.alpha, group=head.group, temperature=head.temperature
        )
    else:
        divergence = topk_divergence(topk_logprobs, batch.teacher_logprobs, settings.alpha, tail=settings.tail)
    divergence = torch.where(distilled, divergence, torch.zeros_like(divergence))
    entropy = torch.where(distilled, batch.teacher_entropy, torch.zeros_like(batch.teacher_entropy))
    # fp32 has no exp(−104); the others' weight of 1 may be infinite beside such a mean.
    dynamic = (dynamic_weights(entropy.double(), settings.beta) / mean).to(entropy.dtype)
    dynamic = torch.where(distilled, dynamic, torch.zeros_like(dynamic))
    ratio = distill_ratio(row.logp, row.old, settings.distill_ratio_clip)
    metrics = {
        "srpo/distill_loss": _sum(divergence, weight),
        "srpo/distill_ratio": _sum(ratio, weight),
        "srpo/teacher_entropy": _sum(entropy, weight),
        "srpo/distill_weight_max": dynamic.max().detach(),
    }
    if batch.first_token is not None:
        metrics["srpo/teacher_first_token_entropy"] = _sum(entropy, batch.first_token * weight)
    return dynamic * ratio * divergence, metrics


@torch.no_grad()
def _policy_metrics(row: _Row, entropy: Tensor, loss: Tensor, clipped: Tensor, weights: Tensor) -> dict[str, Tensor]:
    policy = row.mask * (row.batch.policy_weight > 0)
    gap = row.behaviour - row.rollout
    first = {}
    if row.batch.first_token is not None:
        first["actor/first_token_entropy"] = _sum(entropy, row.batch.first_token)
    return first | {
        "actor/entropy": _sum(entropy, row.mask),
        "actor/pg_loss": _sum(loss, policy),
        "actor/pg_clipfrac": _sum(clipped.to(row.mask.dtype), policy),
        "actor/ppo_kl": _sum(row.behaviour - row.logp, row.mask),
        "rollout_corr/logprob_diff_mean": _sum(gap.abs(), row.mask),
        "rollout_corr/logprob_diff_max": gap.abs().masked_fill(~row.on, -math.inf).max(),  # an empty row has none
        "rollout_corr/kl": _sum(-gap, row.mask),
        "rollout_corr/weight": _sum(weights, row.mask),
    }


def routed_loss(
    head: Head, batch: PackedBatch, settings: LossSettings, *, loss_tokens: float, distill_weight_mean: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """This row's part of the objective (scalar), and metrics: [sum, count] pairs, scalars for names in "_max" (maxima)
    and "_total" (sums).

    `head` has the student's distributions, `batch` is the same on all tensor-parallel ranks; its teacher logits are
    still to be divided by the temperature. A row without any counted token gives an exact 0 that is connected to the
    model, so that every rank runs its backward.
    """
    ids = batch.targets[:, None]
    if batch.topk_ids is not None:
        ids = torch.cat([ids, batch.topk_ids], 1)
    logprobs, entropy = head.gather_logprobs(ids)
    if settings.entropy_coef == 0:
        entropy = entropy.detach()  # a metric costs no gradient
    row = _Row(batch, logprobs[:, 0])
    weights = row.clean(
        rollout_weights(
            row.behaviour, row.rollout, row.mask, batch.cu_seqlens, batch.context_group,
            mode=settings.rollout_correction, cap=settings.rollout_correction_cap,
        )
    )  # fmt: skip
    log_ratio = row.logp - row.behaviour  # 0 with a gradient where the policy has not moved
    if settings.sequence_ratio:
        log_ratio = sequence_mean(log_ratio, row.mask, batch.cu_seqlens, batch.context_group)
    policy, clipped = policy_loss(
        log_ratio, batch.advantages,
        clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip,
    )  # fmt: skip
    metrics = _policy_metrics(row, row.clean(entropy), policy, clipped, weights)
    on_policy = weights * policy
    if settings.kl_loss_coef > 0:
        divergence = k3(row.logp, row.clean(batch.reference_logprobs))
        metrics["actor/kl_loss"] = _sum(divergence, row.mask)
        on_policy = on_policy + settings.kl_loss_coef * divergence
    if settings.entropy_coef > 0:
        on_policy = on_policy - settings.entropy_coef * row.clean(entropy)
    total = batch.policy_weight * on_policy
    if batch.teacher_entropy is not None:
        distilled, more = _distillation(row, head, logprobs[:, 1:], settings, distill_weight_mean)
        metrics.update(more)
        total = total + batch.distill_weight * weights * distilled
    loss = (row.mask * total).sum() / max(1.0, loss_tokens)
    metrics["actor/loss_total"] = loss.detach()
    return loss, metrics
