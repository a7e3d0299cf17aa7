"""Draws figures from metrics.jsonl: one run over its iterations, or methods compared over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_srpo.algorithms.section import BY_NAME
from megatron_srpo.core.errors import UserError
from megatron_srpo.observe.curves import AXES, Interval, Record, load_curve, positions, read_metrics, rolling

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# 97.5 % quantile of Student's t by degrees of freedom, from 1 on. For more of them 1.96 is used.
STUDENT_T = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
)  # fmt: skip
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6fb3", "#e07b26", "#3a923a", "#c23b3b", "#7d5fb2", "#8c8c8c"
METHOD_COLOURS = {name: method.colour for name, method in BY_NAME.items() if method.colour}
METHOD_NAMES = {name: method.title for name, method in BY_NAME.items()}
OTHER_COLOURS = (RED, GREY, "#8c564b", "#d66ba0", "#17a2b8")
STYLE: dict[Any, object] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Panel:
    """One set of axes, for metrics that share a unit. `lines` are (metric, legend, colour)."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    unit: str = ""
    kind: str = "number"  # axis: "score" 0 … 1 at least; "percent" 0 … 100 %; "positive" from 0; "log" logarithmic


RUN_PANELS = (
    Panel("Reward", (("critic/score/mean", "rollouts", BLUE), ("eval/accuracy", "held out", ORANGE)), kind="score"),
    Panel(
        "Samples on the SDPO branch",
        (("srpo/sdpo_fraction", "SDPO", GREEN), ("srpo/teacher_available_fraction", "teacher available", GREY)),
        kind="percent",
    ),
    Panel("Entropy a token", (("srpo/teacher_entropy", "teacher", PURPLE), ("actor/entropy", "student", GREY)), "nats"),
    Panel(
        "Response length",
        (
            ("response_length/mean", "all", BLUE),
            ("srpo/response_length_correct", "correct", GREEN),
            ("srpo/response_length_wrong", "wrong", RED),
        ),
        "tokens",
        "positive",
    ),
    Panel(
        "Mismatch of trainer and engine",
        (("rollout_corr/logprob_diff_mean", "mean", RED), ("rollout_corr/logprob_diff_max", "largest", GREY)),
        "|Δ log-prob|, nats",
        "log",
    ),
    Panel("Gradient norm", (("actor/grad_norm", "before clipping", BLUE),), kind="log"),
)

COMPARISON_METRICS = ("eval/accuracy", "response_length/mean", "srpo/sdpo_fraction", "srpo/teacher_entropy")
PERCENT_METRICS = ("eval/accuracy", "srpo/sdpo_fraction")
TITLES = {
    "eval/accuracy": ("Held-out accuracy", ""),
    "critic/score/mean": ("Reward", ""),
    "response_length/mean": ("Response length", "tokens"),
    "eval/response_length": ("Response length, held out", "tokens"),
    "srpo/sdpo_fraction": ("Samples on the SDPO branch", ""),
    "srpo/teacher_entropy": ("Teacher entropy", "nats"),
    "actor/first_token_entropy": ("Entropy of the first token", "nats"),
    "timing_s/step": ("Time of an iteration", "s"),
}
Band = Literal["interval", "deviation"]


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval by Student's t."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, math.nan)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = STUDENT_T[n - 2] if n - 2 < len(STUDENT_T) else 1.96
    return Interval(mean, quantile * deviation / math.sqrt(n))


def plot_run(metrics_jsonl: str | Path, out_png: str | Path, axis: str = "iterations") -> Path:
    """Draw one run: reward, SDPO share, teacher entropy, response length, mismatch, gradient norm. `axis`: see AXES."""
    records = read_metrics(metrics_jsonl)
    where = positions(records, axis)
    with _figure(2, 3, out_png, width=4.0, height=3.1, axis=axis) as (_, grid):
        for axes, panel in zip(grid.flat, RUN_PANELS, strict=True):
            _draw_panel(axes, panel, records, where)
    return Path(out_png)


def plot_comparison(
    series: Mapping[str, Sequence[str | Path]], out_png: str | Path, metrics: Sequence[str] = COMPARISON_METRICS, *,
    axis: str = "iterations", band: Band = "interval",
) -> dict[str, dict[str, dict[int, Interval]]]:  # fmt: skip
    """Draw each metric with a band over seeds; `series` maps a method to its runs' metrics.jsonl.

    The band "interval" is the mean over seeds and its 95 % confidence interval, "deviation" the 5-step mean over all
    seeds ± one standard deviation, as in the SRPO paper. On the axes "hours" and "tokens" (see AXES) a step stands at
    the mean over seeds of its place.

    Returns metric → method → step → Interval, at the steps that all of the method's runs have.
    """
    runs = {method: [read_metrics(path) for path in paths] for method, paths in series.items() if paths}
    if not runs:
        raise UserError("there is no run to compare: expected at least one metrics.jsonl")
    table = {
        name: {method: _over_seeds(records, name, band) for method, records in runs.items()}
        for name in dict.fromkeys(metrics)
    }
    where = {method: _mean_positions(records, axis) for method, records in runs.items()}
    columns = min(2, len(table))
    with _figure(-(-len(table) // columns), columns, out_png, width=5.2, height=3.3, axis=axis) as (figure, grid):
        for axes, (name, methods) in zip(grid.flat, table.items(), strict=False):
            _draw_comparison(axes, name, methods, where, smooth=band == "interval")
        for axes in grid.flat[len(table) :]:
            axes.set_visible(False)
        _shared_legend(figure, runs)
    return table


def comparison_table(curves: Mapping[str, Mapping[int, Interval]], columns: int = 6) -> str:
    """One metric of `plot_comparison` as a Markdown table of at most `columns` steps."""
    steps = sorted({step for curve in curves.values() for step in curve})
    count = min(columns, len(steps))
    shown = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    lines = ["| method | " + " | ".join(f"step {step}" for step in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for method, curve in curves.items():
        cells = [_cell(curve[step]) if step in curve else "–" for step in shown]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def _cell(value: Interval) -> str:
    return f"{value.mean:.3f}" if math.isnan(value.half_width) else f"{value.mean:.3f} ± {value.half_width:.3f}"


def _over_seeds(runs: Sequence[Sequence[Record]], name: str, band: Band) -> dict[int, Interval]:
    curves = [load_curve(records, name) for records in runs]
    if band == "deviation":
        return rolling(curves)
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: mean_interval([curve[step] for curve in curves]) for step in common}


def _mean_positions(runs: Sequence[Sequence[Record]], axis: str) -> dict[int, float]:
    """Step → mean over seeds of its place on the axis, for steps that all of them have."""
    places = [positions(records, axis) for records in runs]
    common = set.intersection(*(set(place) for place in places))
    return {step: math.fsum(place[step] for place in places) / len(places) for step in common}


# ---- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(
    rows: int, columns: int, out_png: str | Path, *, width: float, height: float, axis: str
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Yields (figure, its axes as an array [rows, columns]) and saves the figure when the block ends. It does not use
    pyplot, which needs a screen and keeps global state."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(width * columns, height * rows), layout=layout)
        grid = figure.subplots(rows, columns, squeeze=False)
        yield figure, grid
        for axes in grid[-1]:
            axes.set_xlabel(AXES[axis].label)
        out = Path(out_png)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="png")


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average. The window shrinks towards the ends."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[Record], where: Mapping[int, float]) -> None:
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    drawn = 0
    for name, label, colour in panel.lines:
        curve = load_curve(records, name)
        if panel.kind == "log":
            curve = {step: value for step, value in curve.items() if value > 0}
        if curve:
            drawn += 1
            _draw_curve(
                axes,
                {where[step]: value for step, value in curve.items()},
                label,
                colour,
                sparse=name.startswith("eval/"),
            )
    _finish_axes(axes, panel.kind)
    if not drawn:
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
    elif len(panel.lines) > 1:
        axes.legend(loc="best", fontsize=8)


def _draw_curve(axes: Axes, curve: Mapping[float, float], label: str, colour: str, *, sparse: bool) -> None:
    """Draw points and a line for `sparse` values (evaluations); else the values pale and their moving average."""
    steps, values = list(curve), list(curve.values())
    if sparse or len(steps) < 8:
        axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.4, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.3)
    axes.plot(steps, smoothed(values, max(3, len(values) // 20)), color=colour, linewidth=1.8, label=label)


def _finish_axes(axes: Axes, kind: str) -> None:
    import numpy as np
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    whole = all((np.asarray(line.get_xdata(), dtype=float) % 1 == 0).all() for line in axes.get_lines())
    axes.xaxis.set_major_locator(MaxNLocator(integer=whole, nbins=6))
    if kind == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if high < 50 * low else NullFormatter())
    elif kind == "score":
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.02) if low >= -0.1 else low, max(high, 1.02))
    elif kind == "percent":
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    elif kind == "positive":
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)


def _draw_comparison(
    axes: Axes, name: str, methods: Mapping[str, Mapping[int, Interval]], where: Mapping[str, Mapping[int, float]], *,
    smooth: bool,
) -> None:  # fmt: skip
    title, unit = TITLES.get(name, (name, ""))
    axes.set_title(title)
    axes.set_ylabel(unit)
    for number, (method, curve) in enumerate(methods.items()):
        if not curve:
            continue
        places, means = [where[method][step] for step in curve], [value.mean for value in curve.values()]
        halves = [0.0 if math.isnan(value.half_width) else value.half_width for value in curve.values()]
        colour = _colour(method, number)
        if smooth and len(places) > 60:  # measured in every iteration: without smoothing the band would hide the curves
            window = len(places) // 25
            means, halves = smoothed(means, window), smoothed(halves, window)
        low = [mean - half for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        marker, label = "o" if len(places) <= 30 else None, METHOD_NAMES.get(method, method)
        axes.plot(places, means, color=colour, linewidth=1.8, label=label, marker=marker, markersize=3.5)
    _finish_axes(axes, "percent" if name in PERCENT_METRICS else "positive")


def _colour(method: str, number: int) -> str:
    return METHOD_COLOURS.get(method, OTHER_COLOURS[number % len(OTHER_COLOURS)])


def _shared_legend(figure: Figure, runs: Mapping[str, Sequence[object]]) -> None:
    """One legend above all axes, with the number of seeds."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=_colour(method, number), linewidth=2.5,
            label=f"{METHOD_NAMES.get(method, method)} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})",
        )
        for number, (method, seeds) in enumerate(runs.items())
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)
