"""GRPO (arXiv 2402.03300): every attempt learns from its reward, relative to its group."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_srpo.algorithms.advantages import group_advantages
from megatron_srpo.algorithms.base import GroupAdvantage
from megatron_srpo.core.records import Credit, Group


class Grpo(GroupAdvantage):
    """The SRPO paper's baseline: clip-higher, and no division by the standard deviation."""

    title: ClassVar[str] = "GRPO"
    colour: ClassVar[str] = "#2f6fb3"
    name: Literal["grpo"] = "grpo"

    def credit(self, group: Group) -> list[Credit]:
        advantages = group_advantages(group.scores, divide_by_std=self.advantage_std)
        return [Credit({"policy": 1.0}, advantage) for advantage in advantages]
