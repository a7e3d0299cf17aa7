"""Tables and figures of several finished runs, as in the SRPO paper: the best accuracy within hours of training."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_srpo.core.atomic import atomic_write
from megatron_srpo.core.errors import UserError
from megatron_srpo.observe import published
from megatron_srpo.observe.curves import Record, load_curve, positions, read_metrics
from megatron_srpo.observe.metrics import METRICS_FILE
from megatron_srpo.observe.published import BASE, BENCHMARKS, BUDGETS, MEAN

ACCURACY, SECONDS = "eval/accuracy", "timing_s/step"
FIGURE_METRICS = (ACCURACY, "response_length/mean", "srpo/sdpo_fraction", "srpo/teacher_entropy",
                  "actor/first_token_entropy", SECONDS)  # fmt: skip
NOTES = (
    "Accuracy in percent: the best evaluation within the hours, and for several runs mean ± standard deviation over "
    "them. Hours are the summed time of iterations, without evaluations and checkpoints.",
    "(n) is the paper's number, on 8 H20 GPUs. A star marks runs that ended before the hours were over.",
)


@dataclass(frozen=True)
class Run:
    """A run's folder and what it trained. Names are empty if its config.toml does not say them."""

    folder: Path
    model: str
    benchmark: str
    method: str
    records: list[Record] = field(repr=False)

    @property
    def hours(self) -> dict[int, float]:
        return positions(self.records, "hours")

    def best(self, hours: float) -> float | None:
        """The best accuracy within so many hours, in percent; None if nothing was evaluated."""
        return self._best(lambda step, spent: spent[step] <= hours)

    def base(self) -> float | None:
        """The accuracy before the first iteration, in percent."""
        return self._best(lambda step, spent: step == 0)

    def ended_before(self, hours: float) -> bool:
        return max(self.hours.values(), default=0.0) < hours

    def step_seconds(self, hours: float) -> float | None:
        """Mean seconds of the iterations that ended within so many hours."""
        spent = self.hours
        found = [value for step, value in load_curve(self.records, SECONDS).items() if 0 < spent[step] <= hours]
        return statistics.fmean(found) if found else None

    def _best(self, counts: Callable[[int, dict[int, float]], bool]) -> float | None:
        spent = self.hours
        found = [100 * value for step, value in load_curve(self.records, ACCURACY).items() if counts(step, spent)]
        return max(found, default=None)


def read_run(folder: Path) -> Run:
    """A run from its output folder. UserError if it has no metrics."""
    if not (folder / METRICS_FILE).is_file():
        raise UserError(f"{folder / METRICS_FILE} is not there: expected the output folder of a training run.")
    records = read_metrics(folder / METRICS_FILE)
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.toml'} cannot be read: {error}") from None
    run, algorithm = config.get("run", {}), config.get("algorithm", {})
    method = run.get("method") or algorithm.get("name") or folder.name
    if config.get("lora", {}).get("rank"):
        method += " (LoRA)"  # no seed of the run of all weights
    return Run(folder, Path(config.get("model", {}).get("path", "")).name, run.get("benchmark", ""), method, records)


def tables(runs: Sequence[Run]) -> str:
    """Everything in Markdown, one model after the other."""
    parts = []
    for model in dict.fromkeys(run.model for run in runs):
        mine = [run for run in runs if run.model == model]
        if model:
            parts.append(f"# {model}")
        budgets = list(_budgets(mine))
        parts += [f"## Best accuracy within {hours} h\n\n{_accuracy_table(mine, model, hours)}" for hours in budgets]
        parts.append(f"## Seconds of an iteration\n\n{_seconds_table(mine, model, budgets)}")
    without = ", ".join(str(run.folder) for run in runs if run.best(math.inf) is None)
    told = (
        [f"No evaluation, and so no accuracy, has: {without}. eval.every and data.test ask for evaluations."]
        if without
        else []
    )
    return "\n\n".join([*parts, *told, *NOTES]) + "\n"


def write_report(runs: Sequence[Run], folder: Path, axis: str) -> list[Path]:
    """Write report.md, and for each model and benchmark a figure with a curve for each method: 5-step means ± one
    standard deviation."""
    from megatron_srpo.observe.report import plot_comparison

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md"]
    atomic_write(written[0], tables(runs))
    for model, benchmark in dict.fromkeys((run.model, run.benchmark) for run in runs):
        series: dict[str, list[Path]] = {}
        for run in runs:
            if (run.model, run.benchmark) == (model, benchmark):
                series.setdefault(run.method, []).append(run.folder / METRICS_FILE)
        picture = folder / ("-".join(filter(None, (model, benchmark, axis))) + ".png")
        plot_comparison(series, picture, FIGURE_METRICS, axis=axis, band="deviation")
        written.append(picture)
    return written


# ---- tables ----------------------------------------------------------------------------------------------------------


def _budgets(runs: Sequence[Run]) -> Iterator[int]:
    """The hours of the tables: those of the paper's benchmarks, and otherwise those within which a run still ran."""
    last = 0
    for hours in BUDGETS:
        if not last or any(run.benchmark in BENCHMARKS or not run.ended_before(last) for run in runs):
            yield hours
        last = hours


def _accuracy_table(runs: Sequence[Run], model: str, hours: int) -> str:
    """Rows are methods, and the model before training; columns are benchmarks, and the mean if all five are there."""
    benchmarks = _in_order(runs)
    rows = []
    for method in (BASE, *dict.fromkeys(run.method for run in runs)):
        mine = [run for run in runs if method in (BASE, run.method)]
        means, cells = [], []
        for benchmark in benchmarks:
            some = [run for run in mine if run.benchmark == benchmark]
            values = [run.base() if method == BASE else run.best(hours) for run in some]
            found = [value for value in values if value is not None]
            early = method != BASE and any(run.ended_before(hours) for run in some)
            means.append(statistics.fmean(found) if found else math.nan)
            cells.append(_cell(found, _published(model, method, hours, benchmark), early))
        known = [mean for name, mean in zip(benchmarks, means, strict=True) if name in BENCHMARKS]
        whole = len(known) == len(BENCHMARKS) and not any(map(math.isnan, known))
        mean = [statistics.fmean(known)] if whole else []
        early = method != BASE and whole and any(run.ended_before(hours) for run in mine)
        rows.append([method, *cells, _cell(mean, _published(model, method, hours, MEAN), early)])
    heading = ["method", *(name or "accuracy" for name in benchmarks), "mean of five"]
    if not set(benchmarks) & set(BENCHMARKS):
        heading, rows = heading[:-1], [row[:-1] for row in rows]
    return _markdown(heading, rows)


def _seconds_table(runs: Sequence[Run], model: str, budgets: Sequence[int]) -> str:
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        cells = []
        for hours in budgets:
            mine = [run for run in runs if run.method == method]
            found = [value for run in mine if (value := run.step_seconds(hours)) is not None]
            early = any(run.ended_before(hours) for run in mine)
            cells.append(_cell(found, published.step_seconds(model, method, hours), early))
        rows.append([method, *cells])
    return _markdown(["method", *(f"first {hours} h" for hours in budgets)], rows)


def _in_order(runs: Sequence[Run]) -> list[str]:
    """The benchmarks of the runs, those of the paper first and in its order."""
    found = {run.benchmark for run in runs}
    return [*(name for name in BENCHMARKS if name in found), *sorted(found - set(BENCHMARKS))]


def _published(model: str, method: str, hours: int, benchmark: str) -> float | None:
    return published.accuracy(model, method, BUDGETS[-1] if method == BASE else hours, benchmark)


def _cell(values: Sequence[float], paper: float | None, early: bool) -> str:
    parts = list(_parts(values, early))
    if paper is not None:
        parts.append(f"({paper:.1f})")
    return " ".join(parts) or "–"


def _parts(values: Sequence[float], early: bool) -> Iterator[str]:
    if values:
        yield f"{statistics.fmean(values):.1f}{'*' * early}"
    if len(values) > 1:
        yield f"± {statistics.stdev(values):.1f}"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
