"""SC-SDPO (arXiv 2605.27765): SDPO whose prompts weigh most where the policy is undecided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from megatron_srpo.algorithms.sdpo import Sdpo
from megatron_srpo.core.records import Group, Needs


class ScSdpo(Sdpo):
    """Distillation weight √(p(1 − p)) over its mean in the batch, p: the share of the group's attempts that are
    correct. Prompts that are always or never solved teach nothing: they are left out of the loss, of its denominator
    and of that mean, so that the mean weight of what is trained is 1."""

    title: ClassVar[str] = "SC-SDPO"
    name: Literal["scsdpo"] = "scsdpo"  # type: ignore[assignment]

    @property
    def distils_all_wrong(self) -> bool:
        return False

    @property
    def needs(self) -> Needs:
        return replace(super().needs, group_baseline=True)  # a group of one is always or never solved

    def balance(self, groups: Sequence[Group]) -> None:
        spread = [_spread([attempt.correct for attempt in group.attempts]) for group in groups]
        undecided = [value for value in spread if value]
        mean = math.fsum(undecided) / max(1, len(undecided))
        for group, value in zip(groups, spread, strict=True):
            for attempt in group.attempts if not value else ():
                attempt.why += ", but the group is always or never right"
            for sample in group.samples:
                if "distill" in sample.weights:
                    sample.weights = {**sample.weights, "distill": value / mean} if value else {}


def _spread(correct: Sequence[bool]) -> float:
    solved = sum(correct) / len(correct)
    return math.sqrt(solved * (1 - solved))
