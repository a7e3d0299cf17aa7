"""Joins the losses to the passes of the trainer: what each pass computes from a row's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_srpo.config import Config
from megatron_srpo.losses import LossSettings, dynamic_weights, gather_logprobs, routed_loss, topk
from megatron_srpo.types import PackedBatch, TokenScores


class Objective:
    """The routed objective on one rank's vocabulary shard.

    The score functions take logits [T, v] and a row and return per-position tensors named as in `TokenScores`.
    """

    def __init__(self, config: Config, *, vocab_start: int, group: Any) -> None:
        algorithm = config.algorithm
        self._settings = LossSettings.from_config(algorithm, config.rollout.temperature)
        self._temperature = config.rollout.temperature
        self._shard = {"vocab_start": vocab_start, "group": group}
        self._topk = algorithm.distillation_topk
        self.needs_topk = algorithm.name != "grpo" and self._topk > 0
        self.needs_reference = algorithm.kl_loss_coef > 0

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._temperature == 1.0 else logits / self._temperature

    def _target_logprobs(self, logits: torch.Tensor, row: PackedBatch) -> torch.Tensor:
        return gather_logprobs(self._scaled(logits), row.targets[:, None], **self._shard)[0][:, 0]

    def score_old(self, logits: torch.Tensor, row: PackedBatch) -> dict[str, torch.Tensor]:
        return {"logprob": self._target_logprobs(logits, row)}

    def score_reference(self, logits: torch.Tensor, row: PackedBatch) -> dict[str, torch.Tensor]:
        return {"reference_logprob": self._target_logprobs(logits, row)}

    def score_topk(self, logits: torch.Tensor, row: PackedBatch) -> dict[str, torch.Tensor]:
        return {"topk_ids": topk(logits, self._topk, **self._shard)}

    def score_teacher(self, logits: torch.Tensor, row: PackedBatch) -> dict[str, torch.Tensor]:
        """Teacher log-probs at the student's ids and the entropy over the full vocabulary; for the full-vocabulary
        divergence this rank's shard of the logits instead of the former."""
        scaled = self._scaled(logits)
        # An empty row, which only keeps this rank in step with the others, has no top-k: any id will do.
        ids = row.targets[:, None] if row.topk_ids is None else row.topk_ids
        logprobs, entropy = gather_logprobs(scaled, ids, **self._shard)
        kept = {"teacher_logprobs": logprobs} if self._topk else {"teacher_logits": logits}
        return {**kept, "teacher_entropy": entropy}

    def dynamic_weight_sum(self, scores: list[TokenScores]) -> torch.Tensor:
        """Σ exp(−β H_t) over the distilled tokens of these samples: the numerator of the mean weight over Ω."""
        entropies = [score.teacher_entropy for score in scores if score.teacher_entropy is not None]
        if not entropies:
            return torch.zeros((), dtype=torch.float64)
        return dynamic_weights(torch.cat(entropies).double(), self._settings.beta).sum()

    def loss(self, *, loss_tokens: int, distill_weight_mean: float) -> Callable[[torch.Tensor, PackedBatch], Any]:
        """The loss of one row inside an optimiser step with these global denominators."""

        def row_loss(logits: torch.Tensor, row: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return routed_loss(
                logits, row, self._settings,
                loss_tokens=loss_tokens, distill_weight_mean=distill_weight_mean, **self._shard,
            )  # fmt: skip

        return row_loss
