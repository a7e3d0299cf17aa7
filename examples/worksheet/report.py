"""What the comparison found: mean and 95 % interval over seeds, as a table, as numbers and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

ACCURACY, LENGTH = "eval/accuracy", "eval/response_length"
# Two-sided 97.5 % quantile of Student's t by degrees of freedom; 1.96 beyond.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def curve_of(metrics: Path, name: str) -> dict[int, float]:
    """One metric by iteration, from the lines of metrics.jsonl that have it."""
    rows = (json.loads(line) for line in metrics.read_text().splitlines() if line.strip())
    return {int(row["step"]): float(row[name]) for row in rows if name in row}


def accuracy_curve(metrics: Path) -> dict[int, float]:
    return curve_of(metrics, ACCURACY)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval; the latter is nan for a single value."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, STUDENT_T.get(n - 1, 1.96) * deviation / math.sqrt(n)


def summarize(runs: Mapping[str, Sequence[Path]], name: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Method → iteration → (mean, half-width), at the iterations that all of the method's runs have."""
    result = {}
    for method, files in runs.items():
        curves = [curve_of(file, name) for file in files]
        if curves:
            common = sorted(set.intersection(*(set(curve) for curve in curves)))
            result[method] = {step: mean_and_interval([curve[step] for curve in curves]) for step in common}
    return result


def cell(mean: float, half_width: float) -> str:
    return f"{mean:.2f}" if math.isnan(half_width) else f"{mean:.2f} ± {half_width:.2f}"


def markdown_table(runs: Mapping[str, Sequence[Path]], columns: int = 6) -> str:
    """Held-out accuracy at about `columns` iterations, and the response length at the last one."""
    accuracy, length = summarize(runs, ACCURACY), summarize(runs, LENGTH)
    steps = sorted({step for curve in accuracy.values() for step in curve})
    shown = sorted({steps[round(i * (len(steps) - 1) / max(1, columns - 1))] for i in range(columns)}) if steps else []
    heading = ["method", "seeds", *(f"step {step}" for step in shown), "tokens at the end"]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for method, curve in accuracy.items():
        cells = [cell(*curve[step]) if step in curve else "" for step in shown]
        last = cell(*length[method][max(length[method])]) if length.get(method) else ""
        lines.append("| " + " | ".join([method, str(len(runs[method])), *cells, last]) + " |")
    return "\n".join(lines)


def write_report(runs: Mapping[str, Sequence[Path]], folder: Path) -> str:
    """Writes compare.json, table.md, and compare.png with its forms over hours and over tokens into `folder`; returns
    the table."""
    from megatron_srpo.observe.curves import AXES
    from megatron_srpo.observe.report import plot_comparison

    numbers = {
        name: {
            method: {
                str(step): {"mean": mean, "ci95": None if math.isnan(half) else half}
                for step, (mean, half) in curve.items()
            }
            for method, curve in summarize(runs, name).items()
        }
        for name in (ACCURACY, LENGTH)
    }
    numbers["seeds"] = {method: len(files) for method, files in runs.items()}
    (folder / "compare.json").write_text(json.dumps(numbers, indent=1) + "\n")
    table = markdown_table(runs)
    (folder / "table.md").write_text("Held-out accuracy, mean ± 95 % interval over seeds.\n\n" + table + "\n")
    for axis in AXES:
        picture = folder / ("compare.png" if axis == "iterations" else f"compare_{axis}.png")
        plot_comparison({method: list(files) for method, files in runs.items() if files}, picture, axis=axis)
    return table
