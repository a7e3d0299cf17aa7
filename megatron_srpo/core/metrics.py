"""Metrics and how they add up over rows, ranks and optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """Adds up over rows and ranks as Σ total ÷ Σ count; unknown while the count is 0."""

    total: Tensor | float
    count: Tensor | float = 1.0

    def __float__(self) -> float:
        return float(self.total) / float(self.count)


@dataclass(frozen=True)
class Total:
    """Adds up over rows and ranks; the log shows the mean over optimizer steps."""

    value: Tensor | float

    def __float__(self) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Max:
    """The largest of all rows, ranks and optimizer steps; unknown while it is −∞."""

    value: Tensor | float

    def __float__(self) -> float:
        return float(self.value)


Metric = Mean | Total | Max
Metrics = Mapping[str, Metric]


def over_steps(steps: Sequence[Metrics]) -> dict[str, float]:
    """One number for each metric of several optimizer steps, by name: the largest of maxima, else the mean of the steps
    that have it."""
    result = {}
    for name in sorted({name for step in steps for name in step}):
        found = [step[name] for step in steps if name in step]
        values = [float(metric) for metric in found]
        result[name] = max(values) if isinstance(found[0], Max) else sum(values) / len(values)
    return result
