"""Functions run in a process of their own that is no rank: what patches torch for the CPU must not stay in pytest's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.distributed_harness import PRELOADED


def fresh_process() -> ProcessPoolExecutor:
    """One worker, a fork of a process that has imported the slow modules; `.submit(function, …).result()`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(1, mp_context=context)


def run_as_torchrun_does(function: Callable[..., Any], world_size: int, port: int, *args: Any) -> list[int]:
    """Call `function(*args)` in processes with torchrun's environment and no process group; returns exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    raise SystemExit(function(*args))
