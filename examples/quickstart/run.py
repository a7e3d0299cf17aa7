"""`make quickstart`: warm start → SRPO on Megatron Core and vLLM under torchrun → accuracy before and after.

Run from the checkout: python -m examples.quickstart.run [--algorithm srpo] [--seed 0] [--section.key VALUE …]
Options that it does not know go to the trainer, for example --run.iterations 10.
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
from rich.table import Table

from examples.quickstart.task import WARM_START, Ordering
from examples.tiny.launch import ROOT, Interrupted, TrainingFailed, run_training, train_command
from examples.tiny.runs import SUMMARY, cached_warm_start, open_run, place_inputs, refuse_placed, request_of, shown_path
from megatron_srpo.config import check, load_config
from megatron_srpo.core import exit_codes, streams
from megatron_srpo.core.errors import UserError

CONFIG = Path("examples/quickstart/quickstart.toml")
CACHE = Path("runs/cache")
ALGORITHMS = ("srpo", "grpo", "sdpo", "mix")
TRAIN_ROWS, TEST_ROWS = 4096, 500
RANKS = 2
OPTIONS = {
    "run.seed": "Use --seed N, or make quickstart SEED=N.",
    "algorithm.name": "Use --algorithm NAME, or make quickstart ALGORITHM=NAME.",
}


@dataclass(frozen=True)
class Options:
    algorithm: str
    seed: int
    output: Path
    extra: tuple[str, ...]  # for the trainer


def parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog='Other options go to the trainer: --run.iterations 10; with make: ARGS="--run.iterations 10".',
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="srpo")
    parser.add_argument("--seed", type=int, default=0, help="of the training run; the warm start is the same for all")
    parser.add_argument("--output", type=Path, help="folder of the run; by default one for each algorithm")
    known, extra = parser.parse_known_args(arguments)
    name = "quickstart" if known.algorithm == "srpo" else f"quickstart-{known.algorithm}"
    output = known.output or ROOT / "runs" / name
    return Options(known.algorithm, known.seed, shown_path(output, ROOT), tuple(extra))


def accuracies(folder: Path, rows: list[dict[str, str]]) -> dict[str, float]:
    """Held-out accuracy of a Hugging Face folder, sampled at temperature 1 and greedy, by plain transformers."""
    from examples.tiny.sample import Judge

    judge, length = Judge(folder), Ordering().max_new_tokens
    return {"sampled": judge.accuracy(rows, length, 1.0), "greedy": judge.accuracy(rows, length, 0.0)}


def last_iteration(metrics: Path) -> int:
    """The number of the last iteration in metrics.jsonl."""
    steps = [json.loads(line).get("step", 0) for line in metrics.read_text().splitlines() if line.strip()]
    return int(max(steps, default=0))


def draw_curves(run: Path) -> Path:
    from megatron_srpo.observe.report import plot_run

    picture = run / "curves.png"
    plot_run(run / "metrics.jsonl", picture)
    return picture


def show_summary(console: Console, run: Path, summary: dict[str, object]) -> None:
    table = Table(title=f"quickstart: {summary['algorithm']}, seed {summary['seed']}", title_justify="left")
    for heading in ("held-out accuracy", "before", "after"):
        table.add_column(heading, justify="left" if heading.startswith("held") else "right")
    for name, key in (("sampled, T = 1", "accuracy"), ("greedy", "greedy_accuracy")):
        table.add_row(name, f"{summary[f'{key}_before']:.3f}", f"{summary[f'{key}_after']:.3f}")
    console.print(table)
    since = f" since iteration {summary['continued_from']}" if summary["continued_from"] else " in all"
    console.print(f"{summary['iterations']} iterations, {summary['seconds']:.0f} s{since}. In {run}/:", highlight=False)
    for name, what in (
        ("curves.png", "reward, SDPO share, teacher entropy, response length, mismatch"),
        ("metrics.jsonl", "every number of every iteration"),
        ("hf/", "the trained model, for transformers and vLLM"),
        ("summary.json", "the numbers above"),
    ):
        console.print(f"  {name:<14} {what}", highlight=False)


def quickstart(options: Options, console: Console) -> None:
    """The whole job; leaves everything in `options.output`."""
    started, task, run = time.monotonic(), Ordering(), options.output
    refuse_placed(options.extra, OPTIONS)
    chosen = {"run.seed": str(options.seed), "algorithm.name": options.algorithm}
    given = [f"--{key}={value}" for key, value in chosen.items()]
    check(load_config(CONFIG, [*given, *options.extra]), world_size=RANKS)  # a mistake is told before the warm start
    console.print(f"quickstart: {options.algorithm}, seed {options.seed} → {run}", highlight=False)

    console.print("[1/3] a tiny Qwen3, warm-started to be right about one time in four")
    model = cached_warm_start(task, WARM_START, CACHE)
    choices = {"algorithm": options.algorithm, "seed": options.seed, "model": model.name, "extra": list(options.extra)}
    said = open_run(run, request_of(CONFIG, **choices))
    if said:
        console.print(f"  {said}", highlight=False)
    earlier = max((int(step.name[5:]) for step in run.glob("checkpoints/step_*")), default=0)
    overrides = place_inputs(run, model, task, TRAIN_ROWS, TEST_ROWS)
    rows = [json.loads(line) for line in Path(overrides["data.test"]).read_text().splitlines()]
    before, warmed = accuracies(run / "warm_start", rows), time.monotonic()

    console.print(
        f"[2/3] training on {RANKS} ranks; accuracy so far {before['sampled']:.3f}. Ctrl-C stops and keeps it"
    )
    command = train_command(CONFIG, RANKS, overrides | chosen)
    run_training([*command, *options.extra], run / "stderr.log")
    trained = time.monotonic()

    console.print("[3/3] judging the exported model with transformers")
    after = accuracies(run / "hf", rows)
    draw_curves(run)
    summary = {
        "accuracy_before": before["sampled"],
        "accuracy_after": after["sampled"],
        "greedy_accuracy_before": before["greedy"],
        "greedy_accuracy_after": after["greedy"],
        "test_questions": len(rows),
        "iterations": last_iteration(run / "metrics.jsonl"),
        "continued_from": earlier,  # the seconds are those of the iterations after it
        "seconds": round(time.monotonic() - started, 1),
        "warm_start_seconds": round(warmed - started, 1),
        "training_seconds": round(trained - warmed, 1),
        "algorithm": options.algorithm,
        "seed": options.seed,
    }
    (run / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    show_summary(console, run, summary)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    os.chdir(ROOT)
    again = "the same command goes on from the last checkpoint"
    try:
        quickstart(options, console)
    except (Interrupted, KeyboardInterrupt):
        console.print(f"quickstart stopped; {again}")
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISTAKE
    except TrainingFailed as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.status
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    streams.guard()
    sys.exit(main())
