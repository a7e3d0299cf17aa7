"""Runs one case after the other, each in a process of its own that is forked from one in which all is imported.

Importing torch, Megatron Core and vLLM costs more than half of a short run. A forked process starts as a fresh one does
after its imports: nothing has been computed, no process group and no engine exists.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.study.results import CONFIG, Case, keep
from megatron_srpo.run.stopping import PR_SET_PDEATHSIG

RUNS = Path("runs/study")
PRELOADED = (
    "megatron_srpo.run.assembly", "megatron_srpo.run.launch", "megatron_srpo.trainer", "megatron_srpo.mcore.policy",
    "megatron_srpo.losses.objective", "megatron_srpo.checkpoints.saving", "megatron_srpo.rewards",
    "megatron_srpo.bridge", "megatron_srpo.rollout.vllm.cpu_worker", "vllm", "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.qwen3", "transformers",
)  # fmt: skip


class Stopped(Exception):
    """The user stopped the study; the run that was going on has saved a checkpoint."""


class Runner:
    """Trains cases in forked processes."""

    def __init__(self) -> None:
        import importlib

        from megatron_srpo.config import load_config
        from megatron_srpo.run.cli import run_alone
        from megatron_srpo.run.session import prepare_libraries

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        run_alone()
        prepare_libraries(load_config(CONFIG, []))
        for module in PRELOADED:
            importlib.import_module(module)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)  # each run chooses its port

    def run(self, case: Case, prepared: Mapping[str, object]) -> tuple[dict | None, Path]:
        """Train one case, or go on where it was interrupted. Its result, None if it failed; and its log."""
        folder = RUNS / case.task / (("grid-" if case.selects else "again-" if case.again else "") + case.name)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        child = os.fork()
        if child == 0:
            os._exit(_train(case, {**prepared, **case.keys, "run.output_dir": str(folder)}, log))
        status, usage, stopped = _wait(child)
        if stopped:
            raise Stopped
        if status:
            return None, log
        result = keep(case, folder / "metrics.jsonl", usage)
        shutil.rmtree(folder)
        log.unlink()
        return result, log


def _train(case: Case, keys: Mapping[str, object], log: Path) -> int:
    """In the forked process: train with all output in `log`; returns the exit code."""
    from megatron_srpo import api

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # if the study is killed, the run saves and stops
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        code = api.train(api.load(CONFIG, {**keys, "run.seed": case.seed, "optimizer.lr": case.lr}))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(child: int) -> tuple[int, float, bool]:
    """(exit code, CPU seconds with its own children, whether the user stopped it). A signal is passed on once."""
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        os.kill(child, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        _, status, usage = os.wait4(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, bool(asked)
