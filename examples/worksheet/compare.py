"""`make compare`: GRPO, SDPO, SRPO and advantage mix on the worksheet task, over seeds, by the real trainer.

Run from the checkout: python -m examples.worksheet.compare [--seeds 3] [--jobs 1] [--methods grpo,srpo]
Finished runs are kept, interrupted ones go on. Unknown options go to the trainer (--run.iterations 100).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from examples.tiny.launch import ROOT, Training, terminate_as_interrupt, train_command
from examples.tiny.runs import (
    SUMMARY,
    cached_warm_start,
    is_finished,
    open_run,
    place_inputs,
    read_request,
    refuse_placed,
    request_of,
    shown_path,
)
from examples.worksheet.report import accuracy_curve, write_report
from examples.worksheet.task import WARM_START, Worksheet
from megatron_srpo.config import check, load_config
from megatron_srpo.core import exit_codes, streams
from megatron_srpo.core.errors import UserError

CONFIG = Path("examples/worksheet/worksheet.toml")
CACHE = Path("runs/cache")
TRAIN_ROWS, TEST_ROWS = 4096, 300
# Each method's best of 2e-4, 3e-4 and 5e-4 on this task (README.md in this folder describes the task).
LEARNING_RATES = {"grpo": 2e-4, "sdpo": 2e-4, "srpo": 5e-4, "mix": 2e-4}
POLL_SECONDS = 0.5
OPTIONS = {"run.seed": "Use --seeds N: 0, 1, …", "algorithm.name": "Use --methods grpo,srpo."}


@dataclass(frozen=True)
class Options:
    methods: tuple[str, ...]
    seeds: int
    jobs: int
    output: Path
    extra: tuple[str, ...]  # for the trainer


@dataclass(frozen=True)
class Case:
    """One training run of the comparison."""

    method: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"


def parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--methods", default=",".join(LEARNING_RATES), help="comma-separated, of: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs a method: seeds 0, 1, …")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/compare")
    known, extra = parser.parse_known_args(arguments)
    methods = tuple(known.methods.split(","))
    unknown = [method for method in methods if method not in LEARNING_RATES]
    if unknown or known.seeds < 1 or known.jobs < 1:
        parser.error(
            f"unknown methods {unknown}: expected some of {', '.join(LEARNING_RATES)}"
            if unknown
            else f"--seeds and --jobs must be at least 1, got {known.seeds} and {known.jobs}"
        )
    return Options(methods, known.seeds, known.jobs, shown_path(known.output, ROOT), tuple(extra))


def cases_of(options: Options) -> list[Case]:
    """Seed by seed, so that an early stop leaves every method equally far."""
    return [
        Case(method, seed, options.output / f"{method}-seed{seed}")
        for seed in range(options.seeds)
        for method in options.methods
    ]


def start(case: Case, inputs: dict[str, str], extra: Sequence[str]) -> Training:
    overrides = inputs | {
        "run.output_dir": str(case.folder),
        "run.seed": str(case.seed),
        "algorithm.name": case.method,
        "optimizer.lr": str(LEARNING_RATES[case.method]),
    }
    command = train_command(CONFIG, 1, overrides)
    return Training([*command, *extra], case.folder / "log.txt", quiet=True)


def finish(case: Case, seconds: float) -> str:
    """Marks a run as finished; returns its result in words."""
    curve = accuracy_curve(case.folder / "metrics.jsonl")
    summary = {"algorithm": case.method, "seed": case.seed, "seconds": round(seconds, 1), "accuracy": curve}
    (case.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    steps = sorted(curve)
    return (
        f"held-out accuracy {curve[steps[0]]:.2f} → {curve[steps[-1]]:.2f}, {seconds:.0f} s"
        if steps
        else "no evaluation"
    )


class Runner:
    """Works through the cases, `options.jobs` at a time."""

    def __init__(self, cases: Sequence[Case], options: Options, inputs: dict[str, str], console: Console):
        self.waiting = list(cases)
        self.running: dict[Case, tuple[Training, float]] = {}
        self.failed: list[Case] = []
        self._options, self._inputs, self._console, self._total = options, inputs, console, len(cases)

    def run(self) -> None:
        """To the end; Ctrl-C stops the running trainers cleanly and is raised again."""
        with terminate_as_interrupt():
            try:
                while self.waiting or self.running:
                    self._start_some()
                    time.sleep(POLL_SECONDS)
                    self._reap()
            except KeyboardInterrupt:
                self._say("stopping after these iterations (Ctrl-C again: at once) …")
                for training, _ in self.running.values():
                    training.stop()
                raise

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _start_some(self) -> None:
        while self.waiting and len(self.running) < self._options.jobs:
            case = self.waiting.pop(0)
            self._say(f"  {case.name}: started ({self._total - len(self.waiting)} of {self._total})")
            self.running[case] = start(case, self._inputs, self._options.extra), time.monotonic()

    def _reap(self) -> None:
        for case, (training, began) in list(self.running.items()):
            status = training.status()
            if status is None:
                continue
            del self.running[case]
            if status == 0:
                self._say(f"  {case.name}: {finish(case, time.monotonic() - began)}")
            else:
                self._say(f"  {case.name}: failed with status {status}; its messages are in {training.log}")
                self.failed.append(case)


def unfinished(cases: Sequence[Case], options: Options, model: Path) -> list[Case]:
    """The cases that have to run, their folders made ready; the others were finished by the same request."""
    waiting = []
    for case in cases:
        choices = {"method": case.method, "lr": LEARNING_RATES[case.method], "seed": case.seed, "model": model.name}
        request = request_of(CONFIG, **choices, extra=list(options.extra))
        if not is_finished(case.folder) or read_request(case.folder) != request:
            open_run(case.folder, request)
            waiting.append(case)
    return waiting


def compare(options: Options, console: Console) -> int:
    refuse_placed(options.extra, OPTIONS)
    check(load_config(CONFIG, list(options.extra)), world_size=1)  # a mistake is told before the warm start
    console.print("[1/3] a tiny Qwen3 that has misconceptions: right on about one worksheet in eight")
    model = cached_warm_start(Worksheet(), WARM_START, CACHE)
    inputs = place_inputs(options.output / "inputs", model, Worksheet(), TRAIN_ROWS, TEST_ROWS)
    cases = cases_of(options)
    console.print(f"[2/3] {len(options.methods)} methods × {options.seeds} seeds, {options.jobs} at a time")
    waiting = unfinished(cases, options, model)
    console.print(f"{len(cases) - len(waiting)} of {len(cases)} runs are finished already", highlight=False)
    runner = Runner(waiting, options, inputs, console)
    runner.run()
    finished = [case for case in cases if is_finished(case.folder)]
    done = {method: [c.folder / "metrics.jsonl" for c in finished if c.method == method] for method in options.methods}
    if not any(done.values()):
        raise ValueError("no run finished, so there is nothing to compare")
    console.print("[3/3] drawing")
    table = write_report(done, options.output)
    console.print(table, highlight=False)
    console.print(
        f"In {options.output}/: compare.png, table.md, compare.json, and a folder for each run", highlight=False
    )
    return 1 if runner.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    os.chdir(ROOT)
    try:
        return compare(options, console)
    except KeyboardInterrupt:
        console.print("compare stopped; the same command goes on where it was")
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISTAKE
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    streams.guard()
    sys.exit(main())
