"""SRPO (arXiv 2604.02288): failed attempts that can be taught are distilled, all others learn from their reward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import Distillation
from megatron_srpo.core.records import Credit, Group


class Srpo(Distillation):
    """z^SDPO = (1 − c)·m and z^GRPO = 1 − z^SDPO (§3.1), with dynamic weighting, β = 1 (§3.2).

    `distill_iterations` and `distill_patience` add the schedule of "distil, then reinforce" (arXiv 2609.04108, and
    2609.35058 for the gap); it is not in the paper.
    """

    title: ClassVar[str] = "SRPO"
    colour: ClassVar[str] = "#3a923a"
    default_beta: ClassVar[float] = 1.0
    name: Literal["srpo"] = "srpo"
    distill_iterations: int = Field(0, ge=0)
    """Number of iterations with full distillation. Afterwards its weight falls to 0, and the policy loss takes its
    place. 0 sets no such limit; the paper distils for the whole run."""
    distill_patience: int = Field(0, ge=0)
    """End full distillation when the gap between teacher and student has stopped falling: its mean over this number of
    iterations (srpo/distill_loss) has not reached a new lowest value for as many iterations. With distill_iterations
    the earlier of the two counts. 10 is a start. 0 does not look at the gap."""
    distill_decay: int = Field(0, ge=0)
    """Number of iterations over which the distillation weight falls linearly from 1 to 0, after distill_iterations or
    distill_patience has ended full distillation. 0 drops it at once."""

    def distill_weight(self, iteration: int, handed_over: int | None = None) -> float:
        """The share of distillation in iteration number `iteration`, counted from 0. `handed_over`: the first iteration
        after the gap has stopped falling, None if it has not."""
        ends = [end for end in (self.distill_iterations or None, handed_over) if end is not None]
        if not ends or iteration < min(ends):
            return 1.0
        return max(0.0, 1.0 - (iteration - min(ends) + 1) / (self.distill_decay + 1))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.distill_decay and not (self.distill_iterations or self.distill_patience):
            yield (
                f"algorithm.distill_decay = {self.distill_decay}: full distillation never ends, so its weight never "
                "falls; set distill_iterations or distill_patience, or leave it out"
            )

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        distill = self.distill_weight(group.iteration, group.handed_over)
        return [
            Credit({"distill": distill, "policy": 1.0 - distill}, advantage, taught=True)
            if attempt.teachable and not attempt.correct and distill
            else Credit({"policy": 1.0}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]
