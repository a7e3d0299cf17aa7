"""DRIFT (arXiv 2606.30345): SRPO whose weights follow how hard a prompt has been, with a memory of correct responses.

    n = s + f,  raw = (s + 1)/(n + 2),  conf = n/(n + 8),  p = conf · raw + (1 − conf)/2       s, f: faded counts
    hard = σ((0.3 − p)/0.08),  easy = σ((p − 0.7)/0.08),  medium = (1 − hard)(1 − easy),  normalised to a sum of 1
    wrong and teachable    distill 0.35 · easy + 1.0 · hard
    correct                policy 0.05 · easy + 1.0 · medium + 0.3 · hard; 1 without a teacher
    its tokens             1 + medium · (clip(exp(γ · max(log S − log T − 0.2, 0)), 1, 2) − 1)

The bonus of a token is positive, so it is a second loss term, "guided", as in rlsd.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import Distillation, SourceName
from megatron_srpo.core.records import Attempt, Credit, Group, History, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_srpo.core.tensors import Guidance

MARGIN = 0.2  # nats by which the student must be surer than the teacher
LARGEST_BONUS = 2.0
LARGEST_GAP = 20.0  # nats, so that exp stays finite


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def difficulty(history: History) -> tuple[float, float, float]:
    """(easy, medium, hard) of a prompt, summing to 1."""
    seen = history.solved + history.failed
    confidence = seen / (seen + 8)
    solved = confidence * (history.solved + 1) / (seen + 2) + (1 - confidence) / 2
    hard, easy = _sigmoid((0.3 - solved) / 0.08), _sigmoid((solved - 0.7) / 0.08)
    medium = (1 - hard) * (1 - easy)
    total = easy + medium + hard
    return easy / total, medium / total, hard / total


class Drift(Distillation):
    """A prompt's difficulty is that of earlier iterations: a new prompt is medium."""

    title: ClassVar[str] = "DRIFT"
    default_teachers: ClassVar[tuple[SourceName, ...]] = ("sibling", "memory")
    default_beta: ClassVar[float] = 1.0
    name: Literal["drift"] = "drift"
    warmup_iterations: int = Field(0, ge=0)
    """Number of iterations at the start in which every response that can be taught is distilled, and nothing else is
    trained."""
    bonus_rate: float = Field(1.0, ge=0)
    """Rate γ of the bonus of tokens that the student finds likelier than the teacher does."""

    @property
    def needs(self) -> Needs:
        return replace(super().needs, teacher_tokens=True, history=True)

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        return [
            self._credit(attempt, advantage, group)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]

    def _credit(self, attempt: Attempt, advantage: float, group: Group) -> Credit:
        easy, medium, hard = difficulty(group.history)
        if group.iteration < self.warmup_iterations:
            return Credit({"distill": 1.0}, advantage, taught=True) if attempt.teachable else Credit({}, advantage)
        if not attempt.teachable:
            return Credit({"policy": 1.0}, advantage)
        if not attempt.correct:
            return Credit({"distill": 0.35 * easy + hard}, advantage, taught=True)
        policy = 0.05 * easy + medium + 0.3 * hard
        return Credit({"policy": policy, "guided": policy * medium}, advantage, taught=True)

    def guide(self, seen: Guidance) -> Tensor:
        surer = (-seen.teacher_gap - MARGIN).clamp(0, LARGEST_GAP)
        return seen.advantage * ((self.bonus_rate * surer).exp().clamp(1, LARGEST_BONUS) - 1)
