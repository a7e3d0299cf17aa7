"""Joins the losses to the trainer: the scoring passes of an iteration as data, and the loss of an optimizer step.

One place knows what every pass computes from a row's hidden states. The trainer runs them:

    for scoring in objective.passes(plan):
        with policy.weights(scoring.weights):
            … policy.score(rows, scoring.score)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.config import Config
from megatron_srpo.core.metrics import Metrics
from megatron_srpo.core.records import Sample
from megatron_srpo.core.tensors import HeadInput, LossFunction, PackedBatch, ScoreFunction, Scores
from megatron_srpo.losses.distillation import dynamic_weights
from megatron_srpo.losses.head import Head, LinearHead
from megatron_srpo.losses.terms import RoutedLoss, TeacherLogprobs, distilled_positions


@dataclass(frozen=True)
class ScoringPass:
    """A forward pass of an iteration whose results are kept for each sample."""

    name: str  # in the log: forward/<name>_tokens
    rows: Literal["student", "distilled", "teacher", "contrast"]  # see batching/passes.STREAMS
    weights: Literal["student", "teacher", "reference"]
    score: ScoreFunction
    start: int = 0  # the first mini-batch that it scores
    stop: int | None = None  # the mini-batch that it ends before; None: it scores them to the end
    frees: tuple[str, ...] = ()  # scores that nothing needs after it
    each_step: bool = False  # before every optimizer step, over its mini-batch, instead of once over all of them
    replays: bool = True  # tokens whose experts are known use them
    records: bool = False  # the experts that it chooses are used in the steps


class Objective:
    """The routed objective of a configuration."""

    def __init__(self, config: Config, *, head_bytes: int = 0) -> None:
        """`head_bytes`: size of a rank's shard of the LM head, the same number on all ranks."""
        self._algorithm = config.algorithm
        self._loss = RoutedLoss(config.algorithm)
        self._needs = config.algorithm.needs
        self._temperature = config.rollout.temperature
        self._budget = config.train.logits_memory_mib * 2**20
        self._each_step = config.train.score_every == "step"
        self._replays_teacher = config.teacher.routing_replay
        self._records = config.rollout.routing_replay == "old"
        self._trust_region = _TrustRegion(config.teacher.update_rate) if config.teacher.mode == "trust_region" else None
        self._one_pass = one_student_pass(config, head_bytes)
        self._head_moves = head_moves(config)
        self._teacher_head: HeadInput | None = None  # of the last teacher pass, until the step is done

    def passes(self) -> list[ScoringPass]:
        """The scoring passes of one iteration, in order.

        Old log-probs are needed where the policy will have moved: from the second mini-batch on. The samples of a
        teacher row fit as a student row too, because their own prompts are never longer. With train.score_every =
        "step" top-k and teachers follow the policy inside the iteration. Old and reference log-probs never do.

        Top-k ids rarely need a pass of their own. The train pass finds them in the first mini-batch, and with
        train.score_every = "step" in all of them, if `one_student_pass` allows it. The pass for old log-probs finds
        those of the other mini-batches, because both are wanted of the policy before it moves.
        """
        needs, each_step = self._needs, self._each_step
        compares = bool(needs.divergence and needs.topk)
        score = self._on_trained(self._score_old_and_topk if compares and not each_step else self._score_old)
        found = [ScoringPass("old", "student", "student", score, start=1, records=self._records)]
        if compares and not self._one_pass:
            score, stop = self._on_trained(self._score_topk), None if each_step else 1
            found.append(ScoringPass("topk", "distilled", "student", score, stop=stop, each_step=each_step))
        found += self._taught("teacher", self._score_teacher) if needs.teacher else []
        found += self._taught("contrast", self._score_contrast) if needs.contrast else []
        if needs.reference:
            found.append(ScoringPass("reference", "student", "reference", self._on_trained(self._score_reference)))
        # Teacher and reference are other models, which may choose for themselves.
        return [replace(p, replays=p.weights == "student" or self._replays_teacher) for p in found]

    def _taught(self, name: Literal["teacher", "contrast"], score: ScoreFunction) -> list[ScoringPass]:
        """The passes with which the teacher scores one of the samples' streams."""
        judged = ScoringPass(
            name, name, "teacher", self._on_trained(score), frees=("initial_hidden",), each_step=self._each_step
        )
        if self._trust_region is None:
            return [judged]
        initial = self._trust_region.score_initial
        return [ScoringPass("initial", name, "reference", initial, each_step=self._each_step), judged]

    def check_pass(self) -> ScoringPass:
        """Log-probs of the rows of a step, to look for what is not finite."""
        return ScoringPass("check", "student", "student", self._on_trained(self._score_old))

    def _trained(self, given: HeadInput, row: PackedBatch) -> tuple[HeadInput, PackedBatch, Tensor]:
        """What predicts trained tokens, and where it is in the row [R]: the head, which is a large part of a small
        model, does not run on prompts. With a full-vocabulary divergence it does, because the teacher's logits would be
        copied. A row without trained tokens keeps one position, so that no tensor is empty."""
        if self._needs.divergence and not self._needs.topk:
            return given, row, torch.arange(len(row.targets), device=row.targets.device)
        at = row.loss_mask.nonzero()[:, 0]
        at = at if len(at) else at.new_zeros(1)
        return replace(given, hidden=given.hidden.index_select(0, at)), row.at(at), at

    def _on_trained(self, score: ScoreFunction) -> ScoreFunction:
        """`score` of the positions that predict trained tokens; 0 at the others."""

        def whole(given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
            some, part, at = self._trained(given, row)
            found = score(some, part)
            return {
                name: values.new_zeros(len(row.targets), *values.shape[1:]).index_copy_(0, at, values)
                for name, values in found.items()
            }

        return whole

    def _head(self, given: HeadInput) -> Head:
        return LinearHead(**vars(given), temperature=self._temperature, budget_bytes=self._budget)

    def _target_logprobs(self, given: HeadInput, row: PackedBatch) -> Tensor:
        return self._head(given).gather_logprobs(row.targets[:, None])[0][:, 0]

    def _score_old(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        return {"logprob": self._target_logprobs(given, row)}

    def _score_old_and_topk(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        at, k = distilled_positions(row), self._needs.topk
        logprobs, _, ids = self._head(given).gather_topk(row.targets[:, None], k, at)
        return {"logprob": logprobs[:, 0], "topk_ids": ids.int()}

    def _score_reference(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        return {"reference_logprob": self._target_logprobs(given, row)}

    def _score_topk(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        return {"topk_ids": self._head(given).topk(self._needs.topk).int()}

    def _score_teacher(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        """Teacher log-probs at the student's top-k ids and at the trained tokens, whichever are needed, and the entropy
        over the full vocabulary. Where the ids are not known yet, the inputs of the teacher's head are kept for the
        train pass. A divergence over the full vocabulary keeps this rank's shard of the logits."""
        given = self._teachers(given, row)
        head, topk = self._head(given), row.scores.topk_ids
        ids = row.targets[:, None] if topk is None else torch.cat([row.targets[:, None], topk.long()], 1)
        logprobs, entropy, normaliser = head.gather_statistics(ids)
        found = {"teacher_entropy": entropy}
        if self._needs.teacher_tokens:
            found["teacher_logprob"] = logprobs[:, 0]
        if not self._needs.divergence:
            return found
        if not self._needs.topk:
            return found | {"teacher_logits": head.logits()}
        if topk is not None:
            return found | {"teacher_logprobs": logprobs[:, 1:]}
        if row.weights:  # an empty row only keeps this rank in step with the others
            self._keep_head(given)
        return found | {"teacher_hidden": given.hidden, "teacher_normaliser": normaliser}

    def _keep_head(self, given: HeadInput) -> None:
        """Keep the teacher's head for the train pass, in which the model has the student's again."""
        if self._teacher_head is None:
            weight = given.weight.detach()
            weight = weight[: given.width].clone() if self._head_moves else weight
            self._teacher_head = replace(given, hidden=weight[:0], weight=weight)

    def end_step(self) -> None:
        """Frees what the scoring passes have kept for an optimizer step."""
        self._teacher_head = None
        if self._trust_region is not None:
            self._trust_region.free()

    def _score_contrast(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        return {"contrast_logprob": self._target_logprobs(self._teachers(given, row), row)}

    def _teachers(self, given: HeadInput, row: PackedBatch) -> HeadInput:
        """What the teacher's head gets, from what the model with its weights gives."""
        return given if self._trust_region is None else self._trust_region.joined(given, row)

    def distill_weight_sum(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> Tensor:
        """Σ exp(−β H_t) over the distilled tokens of these samples: the numerator of the mean weight over Ω."""
        settings, entropies = self._algorithm.distillation, []
        for sample, score in zip(samples, scores, strict=True):
            weight = sample.weights.get("distill")
            if weight is not None and score.teacher_entropy is not None:
                on = torch.from_numpy(np.broadcast_to(np.asarray(weight) > 0, sample.length).copy())
                entropies.append(score.teacher_entropy[on])
        if settings is None or not entropies:
            return torch.zeros((), dtype=torch.float64)
        return dynamic_weights(torch.cat(entropies).double(), settings.beta).sum()

    def loss(self, *, loss_tokens: int, responses: int, distill_weight_mean: float) -> LossFunction:
        """The loss of one row inside an optimizer step with these global denominators."""

        def row_loss(given: HeadInput, row: PackedBatch) -> tuple[Tensor, Metrics]:
            given, row, _ = self._trained(given, row)
            return self._loss(
                self._head(given), row,
                loss_tokens=loss_tokens, responses=responses, distill_weight_mean=distill_weight_mean,
                teacher_logprobs=self._kept_teacher(row.scores),
            )  # fmt: skip

        return row_loss

    def _kept_teacher(self, scores: Scores) -> TeacherLogprobs | None:
        """The teacher's log-probs at positions and ids of a row for which its head's inputs were kept."""
        hidden, normaliser, kept = scores.teacher_hidden, scores.teacher_normaliser, self._teacher_head
        if hidden is None or normaliser is None:
            return None
        assert kept is not None, "the teacher's head was kept with its inputs"

        def logprobs(at: Tensor, ids: Tensor) -> Tensor:
            return self._head(replace(kept, hidden=hidden[at])).logprobs_at(ids, normaliser[at])

        return logprobs


def head_moves(config: Config) -> bool:
    """Whether the model's LM head has other values in the train pass than in the teacher pass: it is swapped with the
    teacher's weights, unless the teacher is the student itself or differs from it in adapters alone. The trust region
    joins two heads in memory of its own."""
    return config.teacher.mode not in ("live", "trust_region") and not config.lora.rank


def one_student_pass(config: Config, head_bytes: int) -> bool:
    """Whether the train pass finds the student's top-k ids itself wherever the policy has not moved, instead of a pass
    over the distilled samples.

    It always costs less: for each distilled token K rows of the teacher's head, instead of a forward pass. What decides
    is memory, for the teacher's head and, with dropout, that a pass that drops has other ids than one that does not.
    """
    copies = 2 if config.teacher.mode == "trust_region" else int(head_moves(config))
    drops = config.model.attention_dropout or config.model.hidden_dropout or config.lora.dropout
    budget = config.train.teacher_head_mib * 2**20
    return budget > 0 and not drops and copies * head_bytes <= budget


class _TrustRegion:
    """The teacher whose logits are (1 − μ)·initial + μ·current (SDPO's trust region): one head over both models' hidden
    states, joined. `rate` is μ."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._initial_weight: Tensor | None = None  # in host memory; the same in every iteration
        self._joined: Tensor | None = None  # [initial weight, current weight], made once a teacher pass

    def score_initial(self, given: HeadInput, row: PackedBatch) -> dict[str, Tensor]:
        """Under the initial weights: hidden states, and the head for later."""
        if self._initial_weight is None:
            self._initial_weight = given.weight.detach().to("cpu", copy=True)
        self._joined = None  # the current weights will have moved since the last teacher pass
        return {"initial_hidden": given.hidden}

    def free(self) -> None:
        """Give the memory of the joined head back; the next teacher pass makes it anew."""
        self._joined = None

    def joined(self, given: HeadInput, row: PackedBatch) -> HeadInput:
        """The teacher's head under the current weights. An empty row has no initial hidden states: any teacher will
        do."""
        if row.scores.initial_hidden is None:
            return given
        if self._joined is None:
            assert self._initial_weight is not None, "the initial model is scored before the teacher"
            self._joined = torch.cat([self._initial_weight.to(given.weight.device), given.weight], -1)
        hidden = torch.cat([(1 - self._rate) * row.scores.initial_hidden, self._rate * given.hidden], -1)
        return replace(given, hidden=hidden, weight=self._joined)
