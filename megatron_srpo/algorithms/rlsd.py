"""RLSD and RLRT: the self-teacher redistributes a response's advantage over its tokens.

    Δ_t = log π_teacher(y_t) − log π_old(y_t)
    RLSD (arXiv 2604.03128)   Â_t = A · [(1 − λ) + λ · clip(exp(sign(A) · Δ_t), 1 − ε, 1 + ε)]
    RLRT (arXiv 2605.10781)   Â_t = A · [(1 − λ) + λ · clip(exp(−Δ_t), 1 − ε, 1 + ε)] on correct responses

The factors are positive, and the clipped policy loss of c · A with c > 0 is c times that of A. So Â_t is the sum of two
loss terms: "policy" with weight 1 − λ, and "guided" with weight λ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import SelfTeaching
from megatron_srpo.core.records import Credit, Group, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_srpo.core.tensors import Guidance

LARGEST_GAP = 20.0  # nats, so that exp stays finite


class _TokenCredit(SelfTeaching):
    """What both share."""

    token_credit: float = Field(0.5, ge=0, le=1)
    """Share λ of the advantage that the teacher redistributes over the tokens of a response."""
    token_credit_clip: float = Field(0.2, gt=0, lt=1)
    """Clip ε of the teacher's factor for a token: it stays within 1 − ε and 1 + ε."""
    token_credit_iterations: int = Field(50, ge=0)
    """Number of iterations over which the share λ falls linearly to 0. 0 keeps it for the whole run."""

    @property
    def needs(self) -> Needs:
        return replace(super().needs, teacher_tokens=True)

    def share(self, iteration: int) -> float:
        """λ in iteration number `iteration`, counted from 0."""
        if not self.token_credit_iterations:
            return self.token_credit
        return self.token_credit * max(0.0, 1.0 - iteration / self.token_credit_iterations)

    def guides(self, correct: bool) -> bool:
        """Whether the teacher redistributes the advantage of such a response."""
        return True

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        share = self.share(group.iteration)
        return [
            Credit({"policy": 1.0 - share, "guided": share}, advantage, taught=True)
            if share and advantage and attempt.teachable and self.guides(attempt.correct)
            else Credit({"policy": 1.0}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]

    def _factor(self, gap: Tensor) -> Tensor:
        ratio = gap.clamp(-LARGEST_GAP, LARGEST_GAP).exp()
        return ratio.clamp(1 - self.token_credit_clip, 1 + self.token_credit_clip)


class Rlsd(_TokenCredit):
    """Tokens that the teacher finds likelier than the student weigh more in correct responses, and less in wrong ones.
    The paper synchronises the teacher every 10 steps."""

    title: ClassVar[str] = "RLSD"
    name: Literal["rlsd"] = "rlsd"

    def guide(self, seen: Guidance) -> Tensor:
        return seen.advantage * self._factor(seen.advantage.sign() * seen.teacher_gap)


class Rlrt(_TokenCredit):
    """In correct responses the tokens weigh more that the teacher finds less likely: what the student found itself."""

    title: ClassVar[str] = "RLRT"
    name: Literal["rlrt"] = "rlrt"

    def guides(self, correct: bool) -> bool:
        return correct

    def guide(self, seen: Guidance) -> Tensor:
        return seen.advantage * self._factor(-seen.teacher_gap)
