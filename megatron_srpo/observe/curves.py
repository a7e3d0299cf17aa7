"""Reads curves from metrics.jsonl: a metric by iteration, and an iteration's place on an axis of time or tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_srpo.core.errors import UserError
from megatron_srpo.observe.metrics import read_records

Record = Mapping[str, float | str | None]  # of metrics.jsonl; float() reads its strings
STEP_WINDOW = 5  # values in the mean and in the standard deviation of the SRPO paper's figures


class Axis(NamedTuple):
    """A horizontal axis: its label, the metric that is summed over iterations ("" counts them), and its unit."""

    label: str
    metric: str = ""
    unit: float = 1.0


AXES = {
    "iterations": Axis("iteration"),
    "hours": Axis("hours of training", "timing_s/step", 3600.0),  # without evaluations and checkpoints
    "tokens": Axis("million tokens of prompts and responses", "perf/total_tokens", 1e6),
}


class Interval(NamedTuple):
    """A mean, and half the width of the band around it (NaN if it is unknown)."""

    mean: float
    half_width: float


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl. UserError if it is not there or has none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: expected the metrics.jsonl of a run, in its run.output_dir")
    records: list[Record] = list(read_records(path))
    if not records:
        raise UserError(f"{path} has no metrics: expected one JSON object with a step a line")
    return records


def load_curve(records: Sequence[Record], name: str) -> dict[int, float]:
    """Step → value of one metric, for steps at which it was logged and is finite. The last record of a step counts."""
    found = {}
    for record in records:
        value = record.get(name)
        if value is not None:
            found[int(record["step"] or 0)] = float(value)
    return {step: value for step, value in sorted(found.items()) if math.isfinite(value)}


def positions(records: Sequence[Record], axis: str) -> dict[int, float]:
    """Step → its place on an axis, at the end of the iteration; step 0 is at 0.

    An iteration whose record is lost counts as much as the next one that has one. UserError if the run did not log
    what the axis needs.
    """
    steps = sorted({int(record["step"] or 0) for record in records})
    metric, unit = AXES[axis].metric, AXES[axis].unit
    if not metric:
        return {step: float(step) for step in steps}
    curve = load_curve(records, metric)
    if not curve and any(steps):
        raise UserError(f"expected the metrics of a training run: they have no {metric}, from which {axis} are counted")
    found, total, last = {}, 0.0, 0
    for step in steps:
        if step in curve and step > last:
            total += curve[step] * (step - last) / unit
            last = step
        found[step] = total
    return found


def rolling(curves: Sequence[Mapping[int, float]], window: int = STEP_WINDOW) -> dict[int, Interval]:
    """Mean and standard deviation of the newest `window` values up to each step that all curves have, over all of
    them."""
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    found = {}
    for i, step in enumerate(common):
        values = [curve[near] for near in common[max(0, i - window + 1) : i + 1] for curve in curves]
        found[step] = Interval(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)
    return found
