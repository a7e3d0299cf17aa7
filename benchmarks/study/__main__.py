"""The study: every method on three small tasks, over seeds, at equal budgets (docs/evidence.md has what it found).

    python -m benchmarks.study              continues where it was; Ctrl-C stops it with a checkpoint (a warm start
                                            has none and begins again)
    python -m benchmarks.study collapse     the same, the experiment on collapse alone
    python -m benchmarks.study again        repeats SRPO on the warm start on which other methods ran
    python -m benchmarks.study table        writes the tables of what is finished
    python -m benchmarks.study status       says how many runs are finished of how many
    python -m benchmarks.study.smollm2      the study of a real model, a program of its own

Results are in benchmarks/study/results/, one file for each finished run, and finished runs are never repeated.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.study.methods import (
    AGAIN,
    COLLAPSE_METHODS,
    COLLAPSE_RATE,
    COLLAPSE_TASK,
    MAIN_SEEDS,
    METHODS,
    OTHER_SEEDS,
    SELECTION_SEED,
    Method,
)
from benchmarks.study.options import at_least_one
from benchmarks.study.results import Case, finished
from benchmarks.study.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path("runs/cache/study")


def case_of(task: str, method: Method, seed: int, lr: float, *, selects: bool = False) -> Case:
    keys = {"run.iterations": TASKS[task].iterations, **TASKS[task].keys, **method.keys}
    return Case(task, method.name, seed, lr, keys, selects)


def grid_of(task: str, method: Method) -> list[Case]:
    """The runs that choose its learning rate; none if it uses another method's."""
    return (
        [] if method.rate_of else [case_of(task, method, SELECTION_SEED, lr, selects=True) for lr in TASKS[task].grid]
    )


def chosen_rate(task: str, method: Method) -> float | None:
    """The learning rate whose held-out accuracy is highest on average over the evaluations of the run with
    SELECTION_SEED, the first evaluation left out; the lower of two equal ones. None until all of the grid is done."""
    if method.rate_of:
        return chosen_rate(task, METHODS[method.rate_of])
    found = [finished(case) for case in grid_of(task, method)]
    if any(result is None for result in found):
        return None
    scores = {result["lr"]: [row[3] for row in result["evaluations"][1:]] for result in found if result is not None}
    return max(TASKS[task].grid, key=lambda lr: (sum(scores[lr]) / len(scores[lr]), -lr))


def collapse_cases() -> list[Case]:
    """The experiment on collapse, seed by seed."""
    methods = [METHODS[name] for name in COLLAPSE_METHODS]
    return [
        case_of(COLLAPSE_TASK, method, seed, COLLAPSE_RATE)
        for seed in range(MAIN_SEEDS)
        for method in methods
        if seed < method.seeds
    ]


def again_cases(tasks: Sequence[str] = tuple(TASKS)) -> Iterator[Case]:
    """The repeated runs of main methods (see AGAIN), seed by seed."""
    for seed in range(OTHER_SEEDS):
        for name, wanted in AGAIN.items():
            for task in wanted:
                rate = chosen_rate(task, METHODS[name]) if task in tasks else None
                if rate is not None:
                    yield replace(case_of(task, METHODS[name], seed, rate), again=True)


def cases_of(tasks: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[Case]:
    """What has to run, as far as it is known now: main methods first, seed by seed, so that an early stop leaves all
    methods equally far."""
    chosen = [METHODS[name] for name in methods]
    for main in (True, False):
        group = [method for method in chosen if method.main is main]
        for task in tasks:
            mine = [method for method in group if not method.tasks or task in method.tasks]
            for method in mine:
                yield from grid_of(task, method)
        for seed in range(max((method.seeds for method in group), default=0)):
            for task in tasks:
                for method in group:
                    if seed < min(method.seeds, seeds) and (not method.tasks or task in method.tasks):
                        rate = chosen_rate(task, method)
                        if rate is not None:
                            yield case_of(task, method, seed, rate)


def total_of(tasks: Sequence[str], methods: Sequence[str]) -> tuple[int, int]:
    """(finished, all) runs of the comparison, those of the grids included."""
    done = total = 0
    for task in tasks:
        for method in (METHODS[name] for name in methods):
            if method.tasks and task not in method.tasks:
                continue
            rate, grid = chosen_rate(task, method), grid_of(task, method)
            runs = [] if rate is None else [case_of(task, method, seed, rate) for seed in range(method.seeds)]
            done += sum(finished(case) is not None for case in [*grid, *runs])
            total += len(grid) + method.seeds
    return done, total


def run(options: argparse.Namespace) -> int:
    """Run cases until none is left, or until options.minutes are over. Returns 130 if Ctrl-C or SIGTERM stopped it."""
    from benchmarks.study.runner import Stopped

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is going on has handlers of its own
    try:
        return _run(options)
    except (KeyboardInterrupt, Stopped):
        print("stopped; the same command goes on where it was (a warm start begins again)", flush=True)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    from benchmarks.study.runner import Runner

    end = time.monotonic() + 60 * options.minutes
    prepared: dict[str, dict[str, object]] = {}
    failed: set[Path] = set()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for task in [COLLAPSE_TASK] if options.what == "collapse" else options.tasks:
        if time.monotonic() >= end:
            return 0
        prepared[task] = TASKS[task].prepare(CACHE)
    if time.monotonic() >= end:
        return 0
    runner = Runner()
    while time.monotonic() < end:
        cases: Iterator[Case] | list[Case] = cases_of(options.tasks, options.methods, options.seeds)
        if options.what == "collapse":
            cases = [case for case in collapse_cases() if case.seed < options.seeds and case.method in options.methods]
        elif options.what == "again":
            cases = [case for case in again_cases(options.tasks) if case.method in options.methods]
        case = next((case for case in cases if case.file not in failed and finished(case) is None), None)
        if case is None:
            break
        result, log = runner.run(case, prepared[case.task])
        if result is None:
            failed.add(case.file)
            print(f"{case.task} {case.name}: failed, its messages are in {log}", flush=True)
            continue
        first, last = result["evaluations"][0], result["evaluations"][-1]
        print(
            f"{case.task} {case.name}: held-out accuracy {first[3]:.2f} → {last[3]:.2f}, length {first[4]:.1f} → "
            f"{last[4]:.1f}, {result['whole_cpu_seconds']:.0f} CPU seconds",
            flush=True,
        )
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="study", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "collapse", "again", "table", "status"))
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated, of: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, of: %(default)s")
    parser.add_argument(
        "--seeds", type=at_least_one(int), default=sys.maxsize, help="no more seeds of a method, for now"
    )
    parser.add_argument(
        "--minutes", type=at_least_one(float), default=float("inf"), help="start nothing after this many minutes"
    )
    options = parser.parse_args(arguments)
    options.tasks, options.methods = options.tasks.split(","), options.methods.split(",")
    unknown = [name for name in options.tasks if name not in TASKS]
    unknown += [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(TASKS)}, or of {', '.join(METHODS)}")
    os.chdir(ROOT)
    if options.what in ("run", "collapse", "again"):
        return run(options)
    done, total = total_of(options.tasks, options.methods)
    print(f"{done} of {total} runs of the comparison are finished")
    apart = [finished(case) is not None for case in collapse_cases()]
    print(f"{sum(apart)} of {len(apart)} runs of the experiment on collapse are finished")
    if options.what == "table":
        from benchmarks.study.table import FewerRuns, write_tables

        try:
            print("\n".join(map(str, write_tables(options.tasks, options.methods))))
        except FewerRuns as error:
            print(f"study: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
