"""Whether a finished run collapsed, and when the trainer's own alarm would have told so.

The alarm is megatron_srpo.batching.collapse.CollapseAlarm with the default settings, fed with the metrics of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from megatron_srpo.batching.collapse import WATCHED, CollapseAlarm
from megatron_srpo.config import Config
from megatron_srpo.core.protocols import Log

LOST_LENGTH = 0.5  # of the first evaluation's held-out response length
LOST_ACCURACY = 0.1  # below the best evaluation before


@dataclass(frozen=True)
class Collapse:
    """`alarm`: iteration of the first alarm. `lost`: iteration of the first of at least two evaluations, to the end of
    the run, whose accuracy is at least LOST_ACCURACY below the best one before; a single one may be chance. `held`: the
    last evaluation before `lost`. `collapsed`: the responses ended at less than LOST_LENGTH of their first length, or
    the accuracy was lost."""

    first_length: float
    last_length: float
    best_accuracy: float
    last_accuracy: float
    shrank: bool
    lost: int | None
    held: int | None
    alarm: int | None

    @property
    def collapsed(self) -> bool:
        return self.shrank or self.lost is not None

    @property
    def in_time(self) -> bool:
        """The alarm came before the accuracy was lost, which is sure up to the last evaluation that held it."""
        return self.alarm is not None and (self.held is None or self.alarm <= self.held)

    @property
    def maybe_in_time(self) -> bool:
        """The alarm came between the last evaluation that held the accuracy and the first one that did not."""
        return self.alarm is not None and self.lost is not None and not self.in_time and self.alarm < self.lost


def collapse_of(result: Mapping[str, Any]) -> Collapse:
    """What became of one finished run of the study."""
    evaluations = result["evaluations"]
    accuracies = [row[3] for row in evaluations]
    lost = held = None
    for place in range(len(evaluations) - 1, 0, -1):
        if accuracies[place] > max(accuracies[:place]) - LOST_ACCURACY:
            break
        if place < len(evaluations) - 1:
            lost, held = evaluations[place][0], evaluations[place - 1][0]
    return Collapse(
        first_length=evaluations[0][4],
        last_length=evaluations[-1][4],
        best_accuracy=max(accuracies),
        last_accuracy=accuracies[-1],
        shrank=evaluations[-1][4] < LOST_LENGTH * evaluations[0][4],
        lost=lost,
        held=held,
        alarm=alarm_of(result["traced"]),
    )


def alarm_of(traced: Mapping[str, list[float | None]]) -> int | None:
    """The iteration of the first alarm."""
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "d"}})
    alarm, said = CollapseAlarm(config, {}), []  # type: ignore[var-annotated]
    log = cast(Log, SimpleNamespace(warn=said.append))
    for iteration in range(1, max(map(len, traced.values())) + 1):
        values = {name: traced[name][iteration - 1] for name in WATCHED if name in traced}
        alarm.watch(iteration, {name: value for name, value in values.items() if value is not None}, log)
        if said:
            return iteration
    return None
