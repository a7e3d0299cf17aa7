"""How far trainer and engine differ in a model with experts, with and without routing replay.

    python -m benchmarks.routing_replay CONFIG.toml --iterations 50 --ranks 1

Trains the configuration once for each mode of rollout.routing_replay, from the same start and into folders of its own,
and prints means over all iterations of what the log says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_srpo.config import load_config

GAP, WORST, KL = "rollout_corr/logprob_diff_mean", "rollout_corr/logprob_diff_max", "rollout_corr/kl"
TOKENS, CHOICES, TOKENS_OLD = "rollout_corr/experts_differ", "moe/choices_differ", "moe/tokens_differ"
SHOWN = {
    GAP: "mean |Δ log-prob|", WORST: "largest |Δ log-prob|", KL: "KL estimate", "critic/score/mean": "reward",
    TOKENS: "tokens differ", TOKENS_OLD: "tokens differ (old)", CHOICES: "choices differ",
}  # fmt: skip
MODES = ("off", "old", "rollout")


def compare(
    config: Path, out: Path, *, iterations: int, ranks: int = 1, modes: Sequence[str] = MODES, more: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Mode → metric → its mean over the iterations that have it. `more` are further options of `train`."""
    return {mode: _means(_train(config, out / mode, mode, iterations, ranks, more)) for mode in modes}


def _train(
    config: Path, out: Path, mode: str, iterations: int, ranks: int, more: Sequence[str]
) -> list[dict[str, float]]:
    options = {
        "run.iterations": iterations, "run.output_dir": out, "rollout.routing_replay": mode, "eval.every": 0,
        "checkpoint.every": 0,
    }  # fmt: skip
    launcher = [sys.executable, "-m", "megatron_srpo.torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    train = ["-m", "megatron_srpo", "train", str(config), *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run([*launcher, *train, *more], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'training with rollout.routing_replay = "{mode}" failed\n{done.stdout}\n{done.stderr}')
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if GAP in line]


def _means(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    found = {name: [float(line[name]) for line in lines if name in line] for name in SHOWN}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def main(
    config: Path,
    iterations: Annotated[int, typer.Option(help="Iterations of each run.")] = 50,
    ranks: Annotated[int, typer.Option(help="Training ranks.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs; default: beside the run's own.")] = None,
) -> None:
    found = compare(
        config, out or Path(f"{load_config([config]).run.output_dir}-replay"), iterations=iterations, ranks=ranks
    )
    table = Table("rollout.routing_replay", *SHOWN.values(), title=f"means over {iterations} iterations")
    for mode, means in found.items():
        table.add_row(mode, *(f"{means[name]:.3g}" if name in means else "–" for name in SHOWN))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
