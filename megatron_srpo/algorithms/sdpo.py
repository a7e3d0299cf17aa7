"""SDPO (arXiv 2601.20802): every attempt that can be taught is distilled, correct or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import Distillation
from megatron_srpo.core.records import Credit, Group, Needs


class Sdpo(Distillation):
    """z^SDPO = m; attempts without a teacher are left out of the loss and of its denominator."""

    title: ClassVar[str] = "SDPO"
    colour: ClassVar[str] = "#e07b26"
    name: Literal["sdpo"] = "sdpo"
    distill_on: Literal["all", "incorrect", "correct"] = "all"
    """Which responses are distilled; the others are left out of the loss. The paper's ablations use "incorrect" and
    "correct" (arXiv 2604.02288, figure 1b)."""

    @property
    def needs(self) -> Needs:
        return replace(super().needs, group_baseline=False)

    @property
    def distils_all_wrong(self) -> bool:
        return self.distill_on != "correct"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for key in ("kl_loss_coef", "entropy_coef"):
            if value := getattr(self, key):
                yield (
                    f"algorithm.{key} = {value}: it regularises the policy gradient, and {self.name} has none; leave "
                    "it out"
                )

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)  # for the log alone
        return [
            Credit({"distill": 1.0}, advantage, taught=True)
            if attempt.teachable and self.distill_on in ("all", "correct" if attempt.correct else "incorrect")
            else Credit({}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]
