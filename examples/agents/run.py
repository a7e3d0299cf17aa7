"""Warm start → SRPO with feedback on real episodes → held-out accuracy before and after.

Run from the checkout: python -m examples.agents.run calculator|code [--seed 0] [--section.key VALUE …]
Options that it does not know go to the trainer, for example --run.iterations 10.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.agents.tasks import TASKS, WARM_START
from examples.tiny.launch import ROOT, Interrupted, TrainingFailed, run_training, train_command
from examples.tiny.runs import cached_warm_start
from megatron_srpo.config import check, load_config
from megatron_srpo.core import exit_codes, streams
from megatron_srpo.core.errors import UserError

RANKS = 2
TRAIN_ROWS, TEST_ROWS = {"calculator": 2000, "code": 160}, {"calculator": 100, "code": 20}


def run(name: str, seed: int, output: Path, extra: Sequence[str]) -> dict[str, object]:
    """The whole job; returns the summary, which is also in output/summary.json."""
    config = Path(f"examples/agents/{name}.toml")
    check(load_config([config], extra), world_size=RANKS)  # a mistake is told before the warm start
    started, task = time.monotonic(), TASKS[name]
    if output.exists():
        shutil.rmtree(output.with_name(output.name + ".previous"), ignore_errors=True)
        output.rename(output.with_name(output.name + ".previous"))
    print(f"[1/2] {name}: a tiny Qwen3, warm-started to be right about one time in four", flush=True)
    model = cached_warm_start(task, WARM_START, Path("runs/cache"))  # type: ignore[arg-type]
    shutil.copytree(model, output / "warm_start")
    warmed = time.monotonic()
    overrides = {
        "model.path": str(output / "warm_start"), "run.output_dir": str(output), "run.seed": str(seed),
        **task.write_rows(output / "data", TRAIN_ROWS[name], TEST_ROWS[name]),
    }  # fmt: skip
    print(f"[2/2] SRPO with feedback on {RANKS} ranks", flush=True)
    command = train_command(config, RANKS, overrides)
    run_training([*command, *extra], output / "stderr.log")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    accuracies = [(record["step"], record["eval/accuracy"]) for record in records if "eval/accuracy" in record]
    trained = [record for record in records if "episode/turns_mean" in record]
    summary: dict[str, object] = {
        "task": name, "seed": seed, "accuracy_before": accuracies[0][1], "accuracy_after": accuracies[-1][1],
        "accuracies": accuracies, "iterations": accuracies[-1][0],
        "warm_start_seconds": round(warmed - started, 1), "training_seconds": round(time.monotonic() - warmed, 1),
        **{
            f"{key}_{when}": record.get(f"episode/{key}")
            for key in ("turns_mean", "tool_calls", "tool_errors")
            for when, record in (("first", trained[0]), ("last", trained[-1]))
        },
    }  # fmt: skip
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agents", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    known, extra = parser.parse_known_args(arguments)
    os.chdir(ROOT)
    try:
        summary = run(known.task, known.seed, known.output or Path(f"runs/agents-{known.task}"), extra)
    except (Interrupted, KeyboardInterrupt):
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISTAKE
    except TrainingFailed as error:
        print(f"agents: {error}", file=sys.stderr)
        return error.status
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    streams.guard()
    sys.exit(main())
