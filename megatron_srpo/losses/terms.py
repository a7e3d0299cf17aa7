"""The objective of one packed row, or of a context-parallel rank's part of it, as a sum of named terms (SRPO §3.3):

    L = 1/N Σ_t Σ_name weights[name]_t · term(name)_t

    policy    r_t · ℓ_GRPO(advantage)           r_t: rollout correction
    guided    r_t · ℓ_GRPO(Algorithm.guide)     advantages of single tokens, from the teacher's log-probs
    kl        k3 to the reference policy        weights carry the coefficient
    entropy   −H
    distill   r_t · w_t · ρ̄_t · ℓ_SDPO          w_t = exp(−βH)/mean, ρ̄_t: SDPO's clipped ratio

With `loss_aggregation = "seq-mean-token-mean"` it is 1/S Σ_s 1/R_s Σ_t of the same, over S responses of R_s tokens.
N, S and the mean of the dynamic weights span the whole optimizer step and are given, so the sum over rows, however they
are split or spread, is the objective. A new term is a class here and its line in `build_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megatron_srpo.algorithms import Algorithm, Distillation
from megatron_srpo.core.metrics import Max, Mean, Metric, Metrics, Total
from megatron_srpo.core.tensors import Guidance, PackedBatch
from megatron_srpo.losses.distillation import distill_ratio, dynamic_weights, topk_divergence
from megatron_srpo.losses.head import Head
from megatron_srpo.losses.policy import k3, policy_loss, rollout_weights, sequence_mean
from megatron_srpo.losses.vocab_parallel import full_divergence

LAST_TURN = 4  # of an episode whose gap between trainer and engine has a metric of its own; it includes later ones
JENSEN_SHANNON = 0.5  # the α of the symmetric divergence

# (positions [n], global ids [n, K]) → the teacher's log-probs [n, K], fp32
TeacherLogprobs = Callable[[Tensor, Tensor], Tensor]


def mean_over(values: Tensor, weight: Tensor) -> Mean:
    """Σ weight·values ÷ Σ weight, without gradient."""
    return Mean((values.detach() * weight).sum(), weight.sum())


def distilled_positions(batch: PackedBatch) -> Tensor:
    """[n] ascending, where distillation counts: the positions whose top-k ids are wanted. The first one if there is
    none, so that no tensor is empty."""
    weight = batch.weights.get("distill", torch.zeros_like(batch.loss_mask))
    at = ((batch.loss_mask > 0) & (weight > 0)).nonzero()[:, 0]
    return at if len(at) else at.new_zeros(1)


class RowState:
    """A packed row and the student's scores on it. Values outside the loss mask are replaced by 0, so that they
    cannot become NaN."""

    def __init__(
        self,
        head: Head,
        batch: PackedBatch,
        algorithm: Algorithm,
        *,
        entropy_gradient: bool,
        distill_weight_mean: float,
        teacher_logprobs: TeacherLogprobs | None = None,
    ) -> None:
        self.head, self.batch, self.algorithm = head, batch, algorithm
        self.distill_weight_mean = distill_weight_mean
        self.on = batch.loss_mask > 0
        self.mask = batch.loss_mask
        logprobs, entropy = self._compare(teacher_logprobs)
        self.topk_logprobs = logprobs[:, 1:]  # [T, K]
        self.logp = self.clean(logprobs[:, 0])
        self.entropy = self.clean(entropy if entropy_gradient else entropy.detach())  # a metric costs no gradient
        self.old = None if batch.scores.logprob is None else self.clean(batch.scores.logprob)
        self.behaviour = self.logp.detach() if self.old is None else self.old
        self.rollout = self.clean(batch.rollout_logprobs)
        # k3 estimate of the KL divergence to the reference policy [T]; None where nothing was scored under it
        reference = batch.scores.reference_logprob
        self.reference_kl = None if reference is None else k3(self.logp, self.clean(reference))

    def _compare(self, teacher_logprobs: TeacherLogprobs | None) -> tuple[Tensor, Tensor]:
        """The student's log-probs at the target and at its top-k ids [T, 1 + K], and its entropy [T]. Sets what the
        teacher has at these ids: scored before, or asked for now with the ids of this very pass."""
        ids, scores = self.batch.targets[:, None], self.batch.scores
        self.teacher_logprobs = scores.teacher_logprobs
        if teacher_logprobs is None or "distill" not in self.batch.weights:
            topk = () if scores.topk_ids is None else (scores.topk_ids.long(),)
            return self.head.gather_logprobs(torch.cat([ids, *topk], 1))
        settings = self.algorithm.distillation
        assert settings is not None, "only distillation has top-k ids"
        at = distilled_positions(self.batch)
        logprobs, entropy, found = self.head.gather_topk(ids, settings.distillation_topk, at)
        known = teacher_logprobs(at, found[at])
        self.teacher_logprobs = torch.full_like(logprobs[:, 1:], -math.log(known.size(1) + 1))
        self.teacher_logprobs[at] = known.to(logprobs.dtype)
        return logprobs, entropy

    def clean(self, values: Tensor) -> Tensor:
        """`values` [T], 0 outside the loss mask."""
        return torch.where(self.on, values, torch.zeros_like(values))

    @cached_property
    def correction(self) -> Tensor:
        """r_t [T], the rollout correction."""
        return self.clean(
            rollout_weights(
                self.behaviour, self.rollout, self.mask, self.batch.cu_seqlens, self.batch.context_group,
                mode=self.algorithm.rollout_correction, cap=self.algorithm.rollout_correction_cap,
            )
        )  # fmt: skip

    def gap(self, logprob: Tensor | None) -> Tensor:
        """log π_teacher − log π_old of the trained tokens [T], without gradient; 0 without a teacher's `logprob`."""
        return torch.zeros_like(self.mask) if logprob is None else self.clean(logprob - self.behaviour).detach()

    @torch.no_grad()
    def metrics(self) -> dict[str, Metric]:
        """What every row tells, whatever its terms."""
        gap = self.behaviour - self.rollout
        found: dict[str, Metric] = {
            "actor/first_token_entropy": mean_over(self.entropy, self.batch.first_token),
            "actor/entropy": mean_over(self.entropy, self.mask),
            "actor/ppo_kl": mean_over(self.behaviour - self.logp, self.mask),
            "rollout_corr/logprob_diff_mean": mean_over(gap.abs(), self.mask),
            "rollout_corr/logprob_diff_max": Max(gap.abs().masked_fill(~self.on, -math.inf).max()),
            "rollout_corr/kl": mean_over(-gap, self.mask),
            "rollout_corr/weight": mean_over(self.correction, self.mask),
        }
        if self.batch.turn is not None:
            later = {f"{turn}": self.batch.turn == turn for turn in range(1, LAST_TURN)}
            for name, on in {**later, f"{LAST_TURN}_and_later": self.batch.turn >= LAST_TURN}.items():
                found[f"rollout_corr/logprob_diff_turn_{name}"] = mean_over(gap.abs(), self.mask * on)
        if self.reference_kl is not None:
            found["actor/kl_loss"] = mean_over(self.reference_kl, self.mask)
        return found


class Term(Protocol):
    """One named term of the loss."""

    def __call__(self, weight: Tensor, row: RowState) -> tuple[Tensor, Metrics]:
        """`weight` times the term for every token [T], and the term's metrics."""


@dataclass(frozen=True)
class PolicyTerm:
    """The clipped policy gradient (GRPO, or GSPO with a sequence ratio)."""

    algorithm: Algorithm

    def __call__(self, weight: Tensor, row: RowState) -> tuple[Tensor, Metrics]:
        loss, clipped = self.losses(row, row.batch.advantages)
        over = row.mask * (weight > 0)
        metrics = {"actor/pg_loss": mean_over(loss, over), "actor/pg_clipfrac": mean_over(clipped.to(over.dtype), over)}
        return weight * (row.correction * loss), metrics

    def losses(self, row: RowState, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The loss with these advantages [T], and whether its clip was active."""
        log_ratio = row.logp - row.behaviour  # 0 with a gradient where the policy has not moved
        if self.algorithm.importance_ratio == "sequence":
            log_ratio = sequence_mean(log_ratio, row.mask, row.batch.cu_seqlens, row.batch.context_group)
        return policy_loss(
            log_ratio, advantages, clip_low=self.algorithm.clip_ratio_low, clip_high=self.algorithm.clip_ratio_high,
            dual_clip=self.algorithm.dual_clip,
        )  # fmt: skip


@dataclass(frozen=True)
class GuidedTerm:
    """The clipped policy gradient with advantages that the algorithm makes of the teacher's log-probs, token by
    token."""

    policy: PolicyTerm

    def __call__(self, weight: Tensor, row: RowState) -> tuple[Tensor, Metrics]:
        scores, guided = row.batch.scores, row.on & (weight > 0)
        nothing = torch.zeros_like(row.mask)
        seen = [row.batch.advantages, row.gap(scores.teacher_logprob), row.gap(scores.contrast_logprob)]
        guidance = Guidance(*(torch.where(guided, values, nothing) for values in seen))
        advantages = torch.where(guided, self.policy.algorithm.guide(guidance), nothing)
        loss, clipped = self.policy.losses(row, advantages)
        over = guided.to(row.mask.dtype)
        metrics: dict[str, Metric] = {
            "actor/guided_loss": mean_over(loss, over),
            "actor/guided_clipfrac": mean_over(clipped.to(over.dtype), over),
            "actor/guided_advantage": mean_over(advantages, over),
            "srpo/teacher_gap": mean_over(guidance.teacher_gap, over),
        }
        return weight * (row.correction * loss), metrics


@dataclass(frozen=True)
class ReferenceTerm:
    """The KL divergence to the reference policy."""

    def __call__(self, weight: Tensor, row: RowState) -> tuple[Tensor, Metrics]:
        assert row.reference_kl is not None, "a KL term needs the reference's log-probs (Needs.reference)"
        return weight * row.reference_kl, {}


@dataclass(frozen=True)
class EntropyTerm:
    """The entropy bonus."""

    def __call__(self, weight: Tensor, row: RowState) -> tuple[Tensor, Metrics]:
        return -weight * row.entropy, {}


@dataclass(frozen=True)
class DistillTerm:
    """Divergence from the self-teacher, dynamically weighted (SDPO, SRPO §3.2)."""

    settings: Distillation

    def __call__(self, weight: Tensor, row: RowState) -> tuple[Tensor, Metrics]:
        scores = row.batch.scores
        assert scores.teacher_entropy is not None, "distillation needs the teacher's scores (Needs.teacher)"
        distilled = row.on & (weight > 0)
        over = distilled.to(row.logp.dtype)
        divergence = torch.where(
            distilled, self._divergence(row, self.settings.divergence_alpha), torch.zeros_like(row.logp)
        )
        entropy = torch.where(distilled, scores.teacher_entropy, torch.zeros_like(scores.teacher_entropy))
        # In fp64, because exp(−104) is 0 in fp32. Divided by a mean that small, the weight of 1 of tokens that are not
        # distilled may be infinite; the next line removes it.
        dynamic = (dynamic_weights(entropy.double(), self.settings.beta) / row.distill_weight_mean).to(entropy.dtype)
        dynamic = torch.where(distilled, dynamic, torch.zeros_like(dynamic))
        if self.settings.weighs_tokens:
            dynamic = dynamic * self._token_weights(row, distilled)
        ratio = distill_ratio(row.logp, row.old, self.settings.distill_ratio_clip)
        metrics: dict[str, Metric] = {
            "srpo/distill_loss": mean_over(divergence, over),
            "srpo/distill_ratio": mean_over(ratio, over),
            "srpo/teacher_entropy": mean_over(entropy, over),
            "srpo/distill_weight_max": Max(dynamic.max().detach()),
            "srpo/teacher_first_token_entropy": mean_over(entropy, row.batch.first_token * over),
        }
        return weight * row.correction * (dynamic * ratio * divergence), metrics

    @torch.no_grad()
    def _token_weights(self, row: RowState, distilled: Tensor) -> Tensor:
        symmetric = torch.where(distilled, self._divergence(row, JENSEN_SHANNON), torch.zeros_like(row.logp))
        return torch.where(distilled, self.settings.token_weights(symmetric), torch.zeros_like(symmetric))

    def _divergence(self, row: RowState, alpha: float) -> Tensor:
        scores = row.batch.scores
        if scores.teacher_logits is not None:
            head = row.head
            return full_divergence(
                head.logits(), scores.teacher_logits, alpha, group=head.group, temperature=head.temperature
            )
        assert row.teacher_logprobs is not None
        return topk_divergence(row.topk_logprobs, row.teacher_logprobs, alpha, tail=self.settings.distillation_tail)


def build_terms(algorithm: Algorithm) -> dict[str, Term]:
    """The terms by the names that Credit.weights has."""
    policy = PolicyTerm(algorithm)
    terms: dict[str, Term] = {"policy": policy, "kl": ReferenceTerm(), "entropy": EntropyTerm()}
    if algorithm.needs.teacher_tokens:
        terms["guided"] = GuidedTerm(policy)
    if algorithm.distillation is not None:
        terms["distill"] = DistillTerm(algorithm.distillation)
    return terms


class RoutedLoss:
    """The objective of an algorithm."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm, self._terms = algorithm, build_terms(algorithm)

    def __call__(
        self, head: Head, batch: PackedBatch, *, loss_tokens: float, responses: float = 0, distill_weight_mean: float,
        teacher_logprobs: TeacherLogprobs | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        """This row's part of the objective (scalar), and metrics.

        `head` has the student's distributions, `batch` is the same on all tensor-parallel ranks; its teacher logits are
        still to be divided by the temperature. With `teacher_logprobs` the student's top-k ids are those of `head`, and
        not the batch's. A row without any counted token gives an exact 0 that is connected to the model, so that every
        rank runs its backward.
        """
        unknown = set(batch.weights) - set(self._terms)
        assert not unknown, f"no loss term is named {sorted(unknown)}; there are {sorted(self._terms)}"
        row = RowState(
            head, batch, self._algorithm,
            entropy_gradient="entropy" in batch.weights, distill_weight_mean=distill_weight_mean,
            teacher_logprobs=teacher_logprobs,
        )  # fmt: skip
        metrics, total = row.metrics(), 0 * row.logp
        for name in [name for name in self._terms if name in batch.weights]:  # always in the same order
            values, more = self._terms[name](batch.weights[name], row)
            total = total + values
            metrics.update(more)
        if self._algorithm.loss_aggregation == "seq-mean-token-mean":
            assert batch.response_tokens is not None, "a mean over responses needs their lengths"
            loss = (row.mask * total / batch.response_tokens.clamp(min=1)).sum() / max(1.0, responses)
        else:
            loss = (row.mask * total).sum() / max(1.0, loss_tokens)
        return loss, {**metrics, "actor/loss": Total(loss.detach())}
