"""Advantage mix (arXiv 2604.02288 §4.3): λ·ℓ_GRPO + (1 − λ)·ℓ_SDPO on attempts that can be taught, GRPO on others."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import Distillation
from megatron_srpo.core.records import Credit, Group


class Mix(Distillation):
    """The paper mixes advantages per vocabulary entry. A mix of losses has the same gradient on policy, unclipped and
    with the reverse KL, and differs otherwise."""

    title: ClassVar[str] = "advantage mix"
    colour: ClassVar[str] = "#7d5fb2"
    name: Literal["mix"] = "mix"
    mix_lambda: float = Field(0.9, ge=0, le=1)
    """Weight λ of the policy loss, for mix only. The distillation loss gets 1 − λ."""

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        policy, distill = self.mix_lambda, 1.0 - self.mix_lambda
        return [
            Credit({"policy": policy, "distill": distill}, advantage, taught=distill > 0)
            if attempt.teachable
            else Credit({"policy": 1.0}, advantage)
            for attempt, advantage in zip(group.attempts, advantages, strict=True)
        ]
