"""SC-SDPO (arXiv 2605.27765): SDPO whose prompts weigh most where the policy is undecided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from megatron_srpo.algorithms.sdpo import Sdpo
from megatron_srpo.core.records import Group


class ScSdpo(Sdpo):
    """Distillation weight √(p(1 − p)) over its mean in the batch, p: the share of the group's attempts that are
    correct. Prompts that are always or never solved teach nothing."""

    title: ClassVar[str] = "SC-SDPO"
    name: Literal["scsdpo"] = "scsdpo"  # type: ignore[assignment]

    def balance(self, groups: Sequence[Group]) -> None:
        spread = [_spread([attempt.correct for attempt in group.attempts]) for group in groups]
        mean = math.fsum(spread) / len(spread)
        for group, value in zip(groups, spread, strict=True):
            for sample in group.samples:
                if "distill" in sample.weights:
                    sample.weights = {**sample.weights, "distill": value / mean if mean else 0.0}


def _spread(correct: Sequence[bool]) -> float:
    solved = sum(correct) / len(correct)
    return math.sqrt(solved * (1 - solved))
