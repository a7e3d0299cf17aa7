"""SRPO (arXiv 2604.02288): failed attempts that can be taught are distilled, all others learn from their reward."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import Distillation
from megatron_srpo.core.records import Credit, Group


class Srpo(Distillation):
    """z^SDPO = (1 − c)·m and z^GRPO = 1 − z^SDPO (§3.1), with dynamic weighting, β = 1 (§3.2)."""

    title: ClassVar[str] = "SRPO"
    colour: ClassVar[str] = "#3a923a"
    default_beta: ClassVar[float] = 1.0
    name: Literal["srpo"] = "srpo"

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        return [
            Credit({"distill": 1.0}, advantage, taught=True)
            if attempt.teachable and not attempt.correct
            else Credit({"policy": 1.0}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]
