"""Run a function on real ranks, in processes of their own: gloo, and NCCL where there are GPUs."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE_SECONDS = 10
PRELOADED = ["transformers.models.auto", "megatron_srpo.mcore.policy", "megatron_srpo.bridge", "megatron_srpo.trainer"]


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(
    rank: int, func: Callable, world_size: int, port: int, environment: dict, args: tuple, results: Any
) -> None:
    os.environ.update(
        environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        results[rank] = ("ok", func(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results[rank] = ("error", traceback.format_exc())
        raise SystemExit(1) from None


def _join(workers: list[Any]) -> None:
    """Wait for all; when one has failed, the others, which may wait for it for ever, get a moment to fail too."""
    pending = workers
    while pending:
        wait([worker.sentinel for worker in pending])
        if any(worker.exitcode for worker in workers):
            for worker in pending:
                worker.join(GRACE_SECONDS)
                worker.kill()
        pending = [worker for worker in pending if worker.is_alive()]


def run_distributed(func: Callable, world_size: int, *args: Any, fresh: bool = False) -> list[Any]:
    """Call `func(*args)` on `world_size` gloo ranks; return what each rank returned.

    `func` and its arguments must be picklable (a module-level function). A rank that raises fails the
    call with that rank's traceback. The ranks are forks of a process that has imported the slow modules and done
    nothing else; `fresh` ones are not, for what depends on the environment at import.
    """
    context = mp.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(PRELOADED)
    with context.Manager() as manager:
        results = manager.dict()
        port = free_port()
        workers = [
            context.Process(target=_rank_main, args=(rank, func, world_size, port, dict(os.environ), args, results))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        _join(workers)
        failed = {}
        for rank in range(world_size):
            status, value = results.get(rank, ("error", "the rank died without a traceback"))
            if status == "error":
                failed[rank] = value
        if "EADDRINUSE" in failed.get(0, "") and "_create_c10d_store" in failed[0]:  # another process has the port now
            return run_distributed(func, world_size, *args, fresh=fresh)
        if failed:  # first the one that did not fail only because another rank had gone
            rank = min(
                failed, key=lambda rank: (rank not in results, "Connection closed by peer" in failed[rank], rank)
            )
            raise AssertionError(f"rank {rank} of {world_size}:\n{failed[rank]}")
        return [results[rank][1] for rank in range(world_size)]
