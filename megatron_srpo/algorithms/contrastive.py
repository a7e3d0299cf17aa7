"""Contrastive self-teacher (arXiv 2609.21561): how much likelier a right demonstration makes a token than a wrong one.

    A_t = ½ · [log π(y_t | x, c⁺) − log π(y_t | x, c⁻)]        c⁺, c⁻: a correct and a wrong sibling

Both teachers are shown a demonstration, so what a demonstration alone does to lengths cancels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import SelfTeaching
from megatron_srpo.core.records import Credit, Group, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_srpo.core.tensors import Guidance


class Contrastive(SelfTeaching):
    """Attempts that have both siblings; all others learn from their reward."""

    title: ClassVar[str] = "contrastive"
    name: Literal["contrastive"] = "contrastive"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, teacher_tokens=True, contrast=True)

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        return [
            Credit({"guided": 1.0}, advantage, taught=True) if attempt.teachable else Credit({"policy": 1.0}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]

    def guide(self, seen: Guidance) -> Tensor:
        return 0.5 * (seen.teacher_gap - seen.contrast_gap)
