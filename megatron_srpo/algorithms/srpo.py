"""SRPO (arXiv 2604.02288): failed attempts that can be taught are distilled, all others learn from their reward."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import Distillation
from megatron_srpo.core.records import Credit, Group


class Srpo(Distillation):
    """z^SDPO = (1 − c)·m and z^GRPO = 1 − z^SDPO (§3.1), with dynamic weighting, β = 1 (§3.2).

    `distill_iterations` adds the schedule of "distil, then reinforce" (arXiv 2609.04108); it is not in the paper.
    """

    title: ClassVar[str] = "SRPO"
    colour: ClassVar[str] = "#3a923a"
    default_beta: ClassVar[float] = 1.0
    name: Literal["srpo"] = "srpo"
    distill_iterations: int = Field(0, ge=0)
    """Number of iterations with full distillation. Afterwards its weight falls to 0, and the policy loss takes its
    place. 0 distils for the whole run, as in the paper."""
    distill_decay: int = Field(0, ge=0)
    """Number of iterations over which the distillation weight falls linearly from 1 to 0, after distill_iterations. 0
    drops it at once."""

    def distill_weight(self, iteration: int) -> float:
        """The share of distillation in iteration number `iteration`, counted from 0."""
        if not self.distill_iterations or iteration < self.distill_iterations:
            return 1.0
        return max(0.0, 1.0 - (iteration - self.distill_iterations + 1) / (self.distill_decay + 1))

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        distill = self.distill_weight(group.iteration)
        return [
            Credit({"distill": distill, "policy": 1.0 - distill}, advantage, taught=True)
            if attempt.teachable and not attempt.correct and distill
            else Credit({"policy": 1.0}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]
