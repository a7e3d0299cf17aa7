"""RLOO (arXiv 2402.14740): the baseline of an attempt is the mean reward of the others.

The example of CONTRIBUTING.md: a method without a teacher is this file, its line in `__init__.py`, and its test.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_srpo.algorithms.advantages import leave_one_out_advantages
from megatron_srpo.algorithms.base import Algorithm
from megatron_srpo.core.records import Credit, Group


class Rloo(Algorithm):
    """A_i = r_i − mean of the other attempts' rewards: G ÷ (G − 1) times GRPO's advantage."""

    title: ClassVar[str] = "RLOO"
    name: Literal["rloo"] = "rloo"

    def credit(self, group: Group) -> list[Credit]:
        return [Credit({"policy": 1.0}, advantage) for advantage in leave_one_out_advantages(group.scores)]
