"""The command line: train, eval, doctor, report.

A user's mistake ends with one message and exit code 2; Ctrl-C with 130; everything else is a traceback.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from megatron_srpo.config import Config, UserError, check, load_config, read_model_folder, save_resolved

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="SRPO on Megatron Core and vLLM. Train with: torchrun --nproc-per-node N -m megatron_srpo train CONFIG.toml",
)  # fmt: skip
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def _guarded(run: Callable[[], int]) -> None:
    """Run, and leave with its exit code; a user's mistake is one message on the driver, without traceback."""
    driver = os.environ.get("RANK", "0") == "0"
    try:
        code = run()
    except UserError as error:
        if driver:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        if driver:
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    raise typer.Exit(code)


def _alone() -> None:
    """Without torchrun: a world of one on loopback."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _checked(config_file: Path, overrides: list[str]) -> Config:
    """The configuration, after every check that needs no model in memory."""
    config = load_config(config_file, overrides)
    check(config, read_model_folder(config.model.path), int(os.environ.get("WORLD_SIZE", "1")))
    return config


@app.command(context_settings=OVERRIDES)
def train(context: typer.Context, config: Annotated[Path, typer.Argument(help="the run's TOML file")]) -> None:
    """Train. Overrides: --section.key VALUE."""

    def run() -> int:
        settings = _checked(config, context.args)
        _alone()
        from megatron_srpo import launch

        if os.environ["RANK"] == "0":
            save_resolved(settings, Path(settings.run.output_dir) / "config.toml")
        return launch.train(settings)

    _guarded(run)


@app.command(name="eval", context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="the run's TOML file")],
    checkpoint: Annotated[Path | None, typer.Option(help="a run, its checkpoints folder, or one step_NNNNNNNN")] = None,
    hf: Annotated[Path | None, typer.Option(help="a Hugging Face folder")] = None,
    split: Annotated[str, typer.Option(help="train or test")] = "test",
) -> None:
    """Evaluate: avg@k, pass@k and maj@k on a split (k = eval.n_samples)."""

    def run() -> int:
        if (checkpoint is None) == (hf is None):
            raise UserError("eval needs either --checkpoint DIR or --hf DIR")
        if split not in ("train", "test"):
            raise UserError(f"--split {split}: expected train or test")
        extra = [f"--model.path={hf}"] if hf is not None else []
        settings = _checked(config, [*context.args, *extra])
        _alone()
        from megatron_srpo import launch

        return launch.evaluate(settings, checkpoint=checkpoint, split=split)

    _guarded(run)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """What is installed, which device path will be taken, and what is missing."""
    from megatron_srpo.doctor import report as examine

    _guarded(lambda: examine(as_json=as_json))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="output folder of a run")]) -> None:
    """Draw curves.png from a run's metrics.jsonl."""

    def run() -> int:
        from megatron_srpo.observe.report import plot_run

        metrics = run_dir / "metrics.jsonl"
        if not metrics.exists():
            raise UserError(f"{metrics} is not there: expected the output folder of a training run.")
        print(plot_run(metrics, run_dir / "curves.png"))
        return 0

    _guarded(run)
