"""Where an iteration's time goes, from a run of the real training command.

    python benchmarks/step.py runs/quickstart              # a run that is there
    python benchmarks/step.py --train examples/quickstart/quickstart.toml --nproc 2 -- --model.path DIR …

Prints the median over iterations (the first ones left out) of every phase, its share, and tokens per second.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

PHASES = {
    "gen": "generate (vLLM)",
    "reward": "reward",
    "route": "route and plan",
    "score": "score: student top-k and old log-probs",
    "teacher": "score: teacher (weights swapped in and out)",
    "train": "train step",
    "publish": "publish weights to the engines",
}


def read_iterations(run: Path, skip: int) -> list[dict]:
    """Training lines of metrics.jsonl after the first `skip` iterations."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise typer.BadParameter(f"{path} is not there: expected the output folder of a training run")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not a log of the trainer's ({error})") from None
    lines = [line for line in lines if "timing_s/step" in line]
    if len(lines) <= skip:
        raise typer.BadParameter(f"{path} has {len(lines)} iterations, expected more than the {skip} left out")
    return lines[skip:]


def machine() -> str:
    """One line that names the machine."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores of {name}, {accelerator}, torch {torch.__version__}"


def table(lines: list[dict]) -> tuple[Table, dict]:
    """The table, and the same figures as plain data (seconds)."""
    step = statistics.median(line["timing_s/step"] for line in lines)
    result = {"iterations": len(lines), "step_s": step}
    out = Table(title=f"median of {len(lines)} iterations")
    for name, justify in (("phase", "left"), ("ms", "right"), ("share", "right")):
        out.add_column(name, justify=justify)
    named = 0.0
    for key, label in PHASES.items():
        seconds = statistics.median(line.get(f"timing_s/{key}", 0.0) for line in lines)
        named += seconds
        result[f"{key}_s"] = seconds
        out.add_row(label, f"{1e3 * seconds:.1f}", f"{seconds / step:.1%}")
    out.add_row("everything else", f"{1e3 * (step - named):.1f}", f"{(step - named) / step:.1%}")
    out.add_row("iteration", f"{1e3 * step:.1f}", "100 %", style="bold")
    result["tokens_per_second"] = statistics.median(line["perf/tokens_per_second"] for line in lines)
    result["sdpo_fraction"] = statistics.median(line["srpo/sdpo_fraction"] for line in lines)
    return out, result


def main(
    run: Annotated[Path | None, typer.Argument(help="output folder of a finished run")] = None,
    train: Annotated[Path | None, typer.Option(help="train this configuration first")] = None,
    nproc: Annotated[int, typer.Option(help="ranks of that training")] = 2,
    skip: Annotated[int, typer.Option(help="iterations left out at the start")] = 3,
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides of the configuration, after --")] = None,
) -> None:
    """Print where an iteration's time goes."""
    if (run is None) == (train is None):
        raise typer.BadParameter("give either a run folder or --train CONFIG")
    with tempfile.TemporaryDirectory() as scratch:
        if train is not None:
            run = Path(scratch) / "run"
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
                "-m", "megatron_srpo", "train", str(train), f"--run.output_dir={run}", *(overrides or []),
            ]  # fmt: skip
            subprocess.run(command, check=True)
        figures, result = table(read_iterations(run, skip))
    console = Console()
    console.print(machine())
    console.print(figures)
    console.print(f"{result['tokens_per_second']:.0f} tokens/s (prompt and response), SDPO share "
                  f"{result['sdpo_fraction']:.2f}")  # fmt: skip
    console.print_json(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
