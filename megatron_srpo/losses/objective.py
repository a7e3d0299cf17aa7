"""Joins the losses to the passes of the trainer: what each pass computes from a row's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_srpo.config import Config
from megatron_srpo.core.records import HeadInput, PackedBatch, TokenScores
from megatron_srpo.losses import LinearHead, LossSettings, dynamic_weights, routed_loss


class Objective:
    """The routed objective. The score functions return per-position tensors named as in `TokenScores`."""

    def __init__(self, config: Config) -> None:
        algorithm = config.algorithm
        self._settings = LossSettings.from_config(algorithm)
        self._temperature = config.rollout.temperature
        self._budget = config.train.logits_memory_mib * 2**20
        self._topk = algorithm.distillation_topk
        self.needs_topk = algorithm.name != "grpo" and self._topk > 0
        self.needs_reference = algorithm.kl_loss_coef > 0
        self.needs_initial = config.teacher.mode == "trust_region"
        self._rate = config.teacher.update_rate
        self._initial_weight: torch.Tensor | None = None

    def _head(self, given: HeadInput) -> LinearHead:
        return LinearHead(**vars(given), temperature=self._temperature, budget_bytes=self._budget)

    def _target_logprobs(self, given: HeadInput, row: PackedBatch) -> torch.Tensor:
        return self._head(given).gather_logprobs(row.targets[:, None])[0][:, 0]

    def score_old(self, given: HeadInput, row: PackedBatch) -> dict[str, torch.Tensor]:
        return {"logprob": self._target_logprobs(given, row)}

    def score_reference(self, given: HeadInput, row: PackedBatch) -> dict[str, torch.Tensor]:
        return {"reference_logprob": self._target_logprobs(given, row)}

    def score_topk(self, given: HeadInput, row: PackedBatch) -> dict[str, torch.Tensor]:
        return {"topk_ids": self._head(given).topk(self._topk)}

    def score_initial(self, given: HeadInput, row: PackedBatch) -> dict[str, torch.Tensor]:
        """The trust-region teacher's first half, under the initial weights: hidden states, and the head for later."""
        if self._initial_weight is None:  # it is the same in every iteration
            self._initial_weight = given.weight.detach().clone()
        return {"initial_hidden": given.hidden}

    def teacher_scores(self) -> Callable[[HeadInput, PackedBatch], dict[str, torch.Tensor]]:
        """The score function of one teacher pass, in which the weights stay as they are: teacher log-probs at the
        student's ids and the entropy over the full vocabulary; for the full-vocabulary divergence this rank's shard of
        the logits instead of the former.

        In a trust region, (1 − μ)·initial + μ·current logits: one head over both models' hidden states, joined.
        """
        joined: list[torch.Tensor] = []  # [initial weight, current weight], made once a pass

        def score_teacher(given: HeadInput, row: PackedBatch) -> dict[str, torch.Tensor]:
            if row.initial_hidden is not None:
                if not joined:
                    joined.append(torch.cat([self._initial_weight, given.weight], -1))
                hidden = torch.cat([(1 - self._rate) * row.initial_hidden, self._rate * given.hidden], -1)
                given = replace(given, hidden=hidden, weight=joined[0])
            return self._score_teacher(self._head(given), row)

        return score_teacher

    def _score_teacher(self, head: LinearHead, row: PackedBatch) -> dict[str, torch.Tensor]:
        # An empty row, which only keeps this rank in step with the others, has no top-k: any id will do.
        ids = row.targets[:, None] if row.topk_ids is None else row.topk_ids
        logprobs, entropy = head.gather_logprobs(ids)
        kept = {"teacher_logprobs": logprobs} if self._topk else {"teacher_logits": head.logits()}
        return {**kept, "teacher_entropy": entropy}

    def dynamic_weight_sum(self, scores: list[TokenScores]) -> torch.Tensor:
        """Σ exp(−β H_t) over the distilled tokens of these samples: the numerator of the mean weight over Ω."""
        entropies = [score.teacher_entropy for score in scores if score.teacher_entropy is not None]
        if not entropies:
            return torch.zeros((), dtype=torch.float64)
        return dynamic_weights(torch.cat(entropies).double(), self._settings.beta).sum()

    def loss(self, *, loss_tokens: int, distill_weight_mean: float) -> Callable[[HeadInput, PackedBatch], Any]:
        """The loss of one row inside an optimiser step with these global denominators."""

        def row_loss(given: HeadInput, row: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return routed_loss(
                self._head(given), row, self._settings, loss_tokens=loss_tokens, distill_weight_mean=distill_weight_mean
            )

        return row_loss
