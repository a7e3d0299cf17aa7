"""What a checkpoint's snapshot costs a rank: seconds, host memory, and how much of both is copies of the same numbers.

    python -m benchmarks.checkpoint [--hidden 512] [--layers 8] [--dtype float32]
    torchrun --nproc-per-node 2 -m benchmarks.checkpoint [--tp 2]   # data-parallel ranks, or tensor-parallel

The model is a random Qwen3 of that size. A snapshot copies weights, fp32 main parameters, both moments and the teacher
into memory that training does not touch. It is timed in turns with its floor: a copy of as many bytes as this rank
writes, into fresh memory. Peaks are those of the process beyond what it had before, and need a kernel that can reset
them. The C library is told to return every large piece of memory at once: otherwise a copy into memory that was used
before looks several times cheaper than the first one, and the peak depends on what was freed before.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import typer

from benchmarks.losses import _peak, _reset_peak
from benchmarks.step import machine
from benchmarks.teacher_swap import _policy
from megatron_srpo.config import Config
from megatron_srpo.mcore import checkpoint, groups
from megatron_srpo.mcore.device import choose_device
from megatron_srpo.run.cli import run_alone

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # glibc's malloc.h


def _bytes(snapshot: checkpoint.Snapshot) -> int:
    """Bytes of the tensors that this rank will write."""
    buckets = snapshot._plan.write_buckets or []
    return sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors)


def _medians(repeats: int, *ways: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds and CPU-seconds of this rank for each way, in turns."""
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, seconds in zip(ways, found, strict=True):
            dist.barrier()
            started, spent = time.perf_counter(), time.process_time()
            way()
            seconds.append((time.perf_counter() - started, time.process_time() - spent))
    return [(statistics.median(wall), statistics.median(cpu)) for wall, cpu in (zip(*s, strict=True) for s in found)]


def main(
    hidden: Annotated[int, typer.Option()] = 512,
    layers: Annotated[int, typer.Option()] = 8,
    vocabulary: Annotated[int, typer.Option()] = 16384,
    dtype: Annotated[str, typer.Option(help="of the model; all other state is fp32")] = "float32",
    tp: Annotated[int, typer.Option(help="tensor parallel size; the other ranks are data parallel")] = 1,
    repeats: Annotated[int, typer.Option()] = 5,
) -> None:
    """Print every rank's bytes, peak and seconds."""
    run_alone()
    path = choose_device("auto", groups.local_rank())
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # after the trainer, which keeps all memory
        libc.mallopt(M_MMAP_MAX, 2**16)
        libc.mallopt(M_MMAP_THRESHOLD, 2**17)
    config = Config(
        model={"path": "random", "dtype": dtype}, data={"train": "unused"},
        parallel={"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1},
    )  # fmt: skip
    topology = groups.initialize(config.parallel, path, seed=0, timeout_minutes=10)
    policy = _policy(config, topology, path, hidden=hidden, layers=layers, vocabulary=vocabulary, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint.snapshot(policy, folder)  # the first one makes Adam's state
        before = _reset_peak("cpu")
        snapshot = checkpoint.snapshot(policy, folder)
        peak, written = _peak("cpu") - before, _bytes(snapshot)
        del snapshot
        source = torch.ones(written // 4)
        ours, floor = _medians(repeats, lambda: checkpoint.snapshot(policy, folder), source.clone)
    facts: list[tuple | None] = [None] * topology.world_size
    dist.all_gather_object(facts, (written, peak, ours, floor), group=topology.control_group)
    if topology.is_driver:
        total = sum(p.numel() for p in policy.shards.parameters.values()) * tp
        print(f"{machine()}; {topology.world_size} rank(s), tp {tp}, {total / 1e6:.1f} M parameters, {dtype}")
        for rank, (size, extra, (wall, cpu), (floor_wall, floor_cpu)) in enumerate(fact for fact in facts if fact):
            print(
                f"rank {rank}: writes {size / 2**20:.1f} MiB; peak {extra / 2**20:.1f} MiB more, "
                f"{extra / max(1, size):.2f} × that; {wall:.2f} s and {cpu:.2f} CPU s, {wall / floor_wall:.1f} and "
                f"{cpu / floor_cpu:.1f} × a copy of what it writes"
            )
    groups.shutdown()


if __name__ == "__main__":
    typer.run(main)
