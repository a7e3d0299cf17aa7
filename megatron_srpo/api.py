"""The Python API: the commands as functions (docs/python-api.md). A mistake of the user is raised as UserError.

from megatron_srpo import api

config = api.load("run.toml", {"optimizer.lr": 1e-6})
api.spawn(config, ranks=8)
rows = api.metrics(config.run.output_dir)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_srpo.config import Config, load_config, save_resolved
from megatron_srpo.config.load import to_toml_value
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.quiet import quiet_libraries


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration, and set keys: {"section.key": value}."""
    overrides = [f"--{key}={to_toml_value(value)}" for key, value in (changes or {}).items()]
    return load_config(path, overrides)


def train(config: Config) -> int:
    """Train in this process, which is one rank: the only one, or one that torchrun started. Returns the exit code: 0
    done, 75 or 130 stopped with a checkpoint. It takes over the signals SIGINT, SIGTERM and SIGHUP, so call it from the
    main thread, once per process, before anything uses the GPU."""
    from megatron_srpo.run.cli import train_here

    return train_here(config)


def spawn(config: Config, ranks: int) -> int:
    """Train with this number of ranks on this machine, in processes of their own. Waits, and returns the exit code of
    the ranks (README.md lists them). The ranks print to this process's output. Ctrl-C, in a terminal or a notebook,
    reaches them too: KeyboardInterrupt is raised when they have saved a checkpoint. A second one ends them at once."""
    with tempfile.TemporaryDirectory(prefix="megatron_srpo-") as folder:
        file = Path(folder) / "run.toml"
        save_resolved(config, file)
        launcher = [sys.executable, "-m", "megatron_srpo.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        with subprocess.Popen([*launcher, "-m", "megatron_srpo", "train", str(file)]) as process:
            return _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that handles Ctrl-C itself. subprocess.run would kill it."""
    interrupted = False
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            interrupted = True
            continue
        if interrupted:
            raise KeyboardInterrupt
        return code


def evaluate(
    config: Config, *, checkpoint: str | Path | None = None, split: str = "test", responses: str | Path | None = None,
    as_teacher: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Evaluate model.path, or a checkpoint or run, in this process: the metrics of docs/metrics.md. `responses`: a
    file for the responses, by default output_dir/eval/SPLIT.jsonl. It takes the first eval.max_prompts prompts, or all
    if that is 0. The layout must be that of one rank. `as_teacher`: the model is shown the data's own solutions, as the
    self-teacher is; the file is then SPLIT-taught.jsonl."""
    from megatron_srpo.run.cli import check_place, check_run, no_solutions, run_alone

    if as_teacher and (problem := no_solutions(config)):
        raise UserError(f"evaluate(as_teacher=True): {problem}")
    check_run(config, splits=(split,))
    name = f"{split}-taught.jsonl" if as_teacher else f"{split}.jsonl"
    file = Path(responses) if responses else Path(config.run.output_dir) / "eval" / name
    check_place(file)
    run_alone()
    from megatron_srpo.run import launch

    return launch.measure(
        config, checkpoint=Path(checkpoint) if checkpoint else None, split=split, responses=file, taught=as_teacher
    )


def convert_to_hf(run: str | Path, out: str | Path, *, dtype: str | None = None) -> None:
    """Write a checkpoint, or the newest one of a run, as a Hugging Face folder. `dtype`: "float32", "bfloat16" or
    "float16"; None keeps what is stored."""
    with warnings.catch_warnings():
        quiet_libraries()
        import torch

        from megatron_srpo.conversion.to_hf import megatron_to_hf

        megatron_to_hf(Path(run), Path(out), dtype=None if dtype is None else getattr(torch, dtype))


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run as a table: one row per iteration, with "step" and every metric (docs/metrics.md).
    pandas.DataFrame(metrics(run)) makes a data frame of it."""
    from megatron_srpo.observe.metrics import METRICS_FILE, read_records

    file = Path(run) / METRICS_FILE
    if not file.is_file():
        raise UserError(f"{run} has no {METRICS_FILE}: expected the output folder of a run")
    return list(read_records(file))
