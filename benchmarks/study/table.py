"""The study's tables: accuracy at equal budgets with 95 % intervals, differences by seed, and who collapsed.

Every method is compared with SRPO on the same seeds (which give the same prompts in the same order) and the same warm
start: two runs have it in common if their evaluations before the training are equal. The p-values are those of
Student's paired t-test, two-sided, corrected by Holm over all comparisons of the measure, on all tasks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.collapse import Collapse, collapse_of
from benchmarks.study.methods import COLLAPSE_METHODS, COLLAPSE_RATE, COLLAPSE_TASK, METHODS
from benchmarks.study.results import RESULTS, Case, finished
from benchmarks.study.statistics import holm, paired_p
from megatron_srpo.observe.curves import Interval
from megatron_srpo.observe.report import mean_interval

REFERENCE, REPEATED = "srpo", " again"  # REPEATED stands behind the name of a method in AGAIN
LEVEL = 0.05
UNKNOWN = Interval(math.nan, math.nan)
Results = Mapping[int, Mapping[str, Any]]  # by seed


def start_of(result: Mapping[str, Any]) -> tuple[float, float]:
    """What tells the warm start of a run, given its seed: accuracy and length of the evaluation before the training."""
    first = result["evaluations"][0]
    return first[3], first[4]


class FewerRuns(Exception):
    """The tables that are there count more runs than were found. str() says how many."""


@dataclass(frozen=True)
class Measure:
    """Held-out accuracy when a share of a budget is spent. `column`: of the evaluations, 1 tokens and 2 CPU seconds."""

    title: str
    column: int
    share: float


MEASURES = (
    Measure("early (a third of the tokens)", 1, 1 / 3),
    Measure("end, equal tokens", 1, 1.0),
    Measure("end, equal CPU seconds", 2, 1.0),
)


def budget(reference: Results, column: int) -> float:
    """What a run of GRPO uses in all its iterations, the median over its seeds."""
    spent = sorted(result["evaluations"][-1][column] for result in reference.values())
    return spent[len(spent) // 2] if spent else math.inf


def accuracy_at(result: Mapping[str, Any], column: int, spent: float) -> float:
    """Held-out accuracy at the last evaluation for which at most `spent` was used (half an evaluation's distance is
    granted, because evaluations are at the same iterations and not at the same tokens). A run that used less counts
    with its last evaluation."""
    rows = result["evaluations"]
    slack = rows[-1][column] / (len(rows) - 1) / 2
    return float([row for row in rows if row[column] <= spent + slack][-1][3])


@dataclass
class Comparison:
    """One method against the reference on one task, at one measure."""

    task: str
    method: str
    accuracy: Interval
    seeds: int
    difference: Interval = UNKNOWN
    pairs: int = 0
    p: float = math.nan
    adjusted: float = math.nan

    @property
    def verdict(self) -> str:
        if math.isnan(self.adjusted):
            return ""
        return "undecided" if self.adjusted > LEVEL else "better" if self.difference.mean > 0 else "worse"


def compare(results: Mapping[str, Mapping[str, Results]], measure: Measure) -> list[Comparison]:
    """All methods on all tasks; `results` is by task and method."""
    found = []
    for task, methods in results.items():
        spent = measure.share * budget(methods.get("grpo", {}), measure.column)
        values = {
            method: {seed: accuracy_at(result, measure.column, spent) for seed, result in runs.items()}
            for method, runs in methods.items()
        }
        reference = {
            (seed, start_of(methods[name][seed])): value
            for name in (REFERENCE, REFERENCE + REPEATED)
            for seed, value in values.get(name, {}).items()
        }
        for method, by_seed in values.items():
            if not by_seed:
                continue
            one = Comparison(task, method, mean_interval(list(by_seed.values())), len(by_seed))
            starts = {seed: (seed, start_of(methods[method][seed])) for seed in sorted(by_seed)}
            pairs = [by_seed[seed] - reference[start] for seed, start in starts.items() if start in reference]
            if method not in (REFERENCE, REFERENCE + REPEATED) and len(pairs) > 1:  # one may be chance
                one.difference, one.pairs, one.p = mean_interval(pairs), len(pairs), paired_p(pairs)
            found.append(one)
    for one, adjusted in zip(found, holm([one.p for one in found]), strict=True):
        one.adjusted = adjusted
    return found


def load(tasks: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, dict[int, Any]]]:
    """The finished runs of the study at the chosen learning rates, by task, method and seed. Repeated runs are those of
    a method with REPEATED behind its name."""
    from benchmarks.study.__main__ import again_cases, case_of, chosen_rate

    found: dict[str, dict[str, dict[int, Any]]] = {}
    for task in tasks:
        for method in (METHODS[name] for name in methods):
            rate = chosen_rate(task, method)
            seeds: list[Case] = [] if rate is None else [case_of(task, method, s, rate) for s in range(method.seeds)]
            runs = {case.seed: result for case in seeds if (result := finished(case)) is not None}
            found.setdefault(task, {})[method.name] = runs
    for case in again_cases(tasks):
        if case.method in methods and (result := finished(case)) is not None:
            found[case.task].setdefault(case.method + REPEATED, {})[case.seed] = result
    return found


def collapse_runs() -> dict[str, dict[int, Any]]:
    """The finished runs of the experiment on collapse, by method and seed."""
    from benchmarks.study.__main__ import collapse_cases

    found: dict[str, dict[int, Any]] = {name: {} for name in COLLAPSE_METHODS}
    for case in collapse_cases():
        if (result := finished(case)) is not None:
            found[case.method][case.seed] = result
    return found


def write_tables(tasks: Sequence[str], methods: Sequence[str]) -> list[Path]:
    """tables.md and tables.json beside the results; returns their paths. FewerRuns if that would lose runs."""
    results = load(tasks, methods)
    compared = {measure.title: compare(results, measure) for measure in MEASURES}
    apart = collapse_runs()
    runs = _distinct([*results.values(), apart])
    markdown, numbers = RESULTS / "tables.md", RESULTS / "tables.json"
    there = re.search(r"^(\d+) runs, ", markdown.read_text(), re.MULTILINE) if markdown.exists() else None
    if there and len(runs) < int(there[1]):
        raise FewerRuns(
            f"{markdown} counts {there[1]} runs, and only {len(runs)} finished ones were found for these tasks and "
            f"methods in {RESULTS}; the tables were not written. Leave out --tasks and --methods, bring the missing "
            f"results back, or delete {markdown} if its runs are to be given up"
        )
    text = [_header(runs)]
    for task in tasks:
        if any(results[task].values()):
            text += [f"## {task}", _accuracies(task, results[task], compared), _collapses(results[task])]
    if any(apart.values()):
        found = {measure.title: compare({COLLAPSE_TASK: apart}, measure) for measure in MEASURES}
        compared |= {f"collapse, {title}": rows for title, rows in found.items()}
        title = f"## Collapse: {COLLAPSE_TASK}, with the rate {COLLAPSE_RATE:g} for all methods"
        text += [title, _accuracies(COLLAPSE_TASK, apart, found), _collapses(apart)]
    markdown.write_text("\n\n".join(text) + "\n")
    rows = {title: [vars(one) | {"verdict": one.verdict} for one in found] for title, found in compared.items()}
    numbers.write_text(json.dumps(rows, indent=1).replace("NaN", "null") + "\n")
    print(markdown.read_text())
    return [markdown, numbers]


def _distinct(results: Sequence[Mapping[str, Results]]) -> list[Mapping[str, Any]]:
    """All runs; one that is in both experiments counts once."""
    found = [run for methods in results for seeds in methods.values() for run in seeds.values()]
    return list({(run["task"], run["method"], run["seed"], run["lr"], start_of(run)): run for run in found}.values())


def _header(runs: Sequence[Mapping[str, Any]]) -> str:
    facts = {f"{name} {value}" for run in runs for name, value in run["versions"].items() if name != "megatron_srpo"}
    return "\n".join(
        [
            "# Tables of the study",
            "",
            "`python -m benchmarks.study table` writes this file. Held-out accuracy, mean ± 95 % interval over seeds.",
            "Δ: difference to SRPO on the same seeds and the same warm start, ± 95 %; none without such runs. Rows",
            'with "again" were repeated on the warm start on which the methods that are not main ones ran. "better"',
            'and "worse": p < 0.05 after Holm\'s correction over all comparisons of the column, on all tasks; the',
            "experiment on collapse is corrected by itself.",
            "A run collapsed if its held-out responses ended at less than half their first length, or its accuracy",
            "stayed 0.1 below its best for two evaluations or more, to the end. An alarm is in time if it came no",
            "later than the last evaluation that held the accuracy, and maybe in time if it came before the next one.",
            "",
            f"{len(runs)} runs, {sum(run['whole_cpu_seconds'] for run in runs) / 3600:.1f} CPU hours; "
            f"{', '.join(sorted(facts))}; {', '.join(sorted({run['machine'] for run in runs}))}.",
        ]
    )


def _pm(value: Interval, sign: str = "") -> str:
    mean, half = value
    return f"{mean:{sign}.2f}" if math.isnan(half) else f"{mean:{sign}.2f} ± {half:.2f}"


def _accuracies(task: str, methods: Mapping[str, Results], compared: Mapping[str, Sequence[Comparison]]) -> str:
    lines = ["| method | rate | seeds | " + " | ".join(f"{title} | Δ" for title in compared) + " |"]
    lines.append("|---" * (3 + 2 * len(compared)) + "|")
    for method, runs in methods.items():
        if not runs:
            continue
        cells = [method, f"{next(iter(runs.values()))['lr']:g}", str(len(runs))]
        for found in compared.values():
            one = next(one for one in found if (one.task, one.method) == (task, method))
            difference = "" if math.isnan(one.difference.mean) else f"{_pm(one.difference, '+')} {one.verdict}".strip()
            if 0 < one.pairs < one.seeds:
                difference += f" ({one.pairs} pairs)"
            cells += [_pm(one.accuracy), difference]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _collapses(methods: Mapping[str, Results]) -> str:
    lines = [
        "| method | runs | collapsed | length, start → end | best accuracy → end | "
        "collapses with an alarm, in time, maybe | false alarms |",
        "|---" * 7 + "|",
    ]
    for method, runs in methods.items():
        found: list[Collapse] = [collapse_of(run) for run in runs.values()]
        if not found:
            continue
        n, bad = len(found), [one for one in found if one.collapsed]
        start, end = (sum(getattr(one, name) for one in found) / n for name in ("first_length", "last_length"))
        best, last = (sum(getattr(one, name) for one in found) / n for name in ("best_accuracy", "last_accuracy"))
        counts = [sum(getattr(one, name) for one in bad) for name in ("in_time", "maybe_in_time")]
        alarms = f"{sum(one.alarm is not None for one in bad)} of {len(bad)}, {counts[0]}, {counts[1]}"
        false = sum(one.alarm is not None for one in found if not one.collapsed)
        lines.append(
            f"| {method} | {n} | {len(bad)} | {start:.1f} → {end:.1f} | {best:.2f} → {last:.2f} | "
            f"{alarms if bad else '–'} | {false} of {n - len(bad)} |"
        )
    return "\n".join(lines)
