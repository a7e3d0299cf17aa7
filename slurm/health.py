"""The check of the nodes before a run: torchrun … -m slurm.health, every rank that will train.

First over gloo: each node is looked at, and all hear of all problems. Then an all-reduce over the job's backend, whose
sums are checked and, on GPUs, its bandwidth. Exit code 0, or UNHEALTHY with a line for each problem; the first rank of
each node says what its node has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_srpo.core.exit_codes import DONE, UNHEALTHY

GIB = 2**30
FLOATS = {"cpu": 2**20, "cuda": 2**26}  # 4 and 256 MiB
ROUNDS = 5
NETWORK = "see SRPO_INTERFACE and SRPO_ADDRESS in slurm/site.env"


def main(arguments: Sequence[str]) -> int:
    wanted = _parse(arguments)
    rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    device = _device(wanted.device)
    limit = timedelta(seconds=wanted.seconds)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=wanted.meet_seconds))
    except Exception as error:
        what = f"{world} ranks did not meet within {wanted.meet_seconds:.0f} s ({_first_line(error)}); {NETWORK}"
        return _fail([f"{host}: {what}"] if local == 0 else [])
    own = [f"{host}: {problem}" for problem in problems(wanted, device)] if local == 0 else []
    found: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(found, own)
    everything = [problem for part in found for problem in part]
    if everything:
        code = _fail(everything if rank == 0 else [])
        dist.barrier()  # torchrun ends all ranks when one has failed: not before it has spoken
        return code
    try:
        speed = all_reduce(device, local, limit)
    except Exception as error:
        return _fail([f"{host}: the all-reduce failed ({_first_line(error)}); {NETWORK}"])
    if local == 0:
        print(f"health of {host}: {_has(device)}; all-reduce over {world} ranks {speed:.2f} GB/s", flush=True)
    speeds = [speed] * world
    dist.all_gather_object(speeds, speed)
    slow = too_slow(min(speeds), device, wanted.min_bandwidth)
    if slow:
        code = _fail([f"the all-reduce over {world} ranks {slow}"] if rank == 0 else [])
        dist.barrier()
        return code
    dist.destroy_process_group()
    return DONE


def too_slow(speed: float, device: str, wanted: float) -> str:
    """What is wrong with a bandwidth in GB/s, or "". gloo on CPUs only carries control messages: any speed will do."""
    if device == "cpu" or speed >= wanted:
        return ""
    return (
        f"reached {speed:.2f} GB/s, SRPO_MIN_BANDWIDTH = {wanted:g}: NCCL may have fallen back from InfiniBand to TCP "
        f"(export NCCL_DEBUG=INFO in slurm/site.env shows its network); {NETWORK}"
    )


def problems(wanted: argparse.Namespace, device: str) -> Iterator[str]:
    """What a node lacks, a line each."""
    if device == "cuda":
        count = torch.cuda.device_count()
        if count < wanted.gpus:
            yield f"{count} GPUs are visible, {wanted.gpus} were expected"
        for index in range(count):
            try:
                free, total = torch.cuda.mem_get_info(index)
            except RuntimeError as error:  # CUDA's, of a GPU that is broken
                yield f"GPU {index}: {_first_line(error)}"
                continue
            if free < 0.9 * total:
                yield f"GPU {index}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free; another process uses it"
    memory = psutil.virtual_memory().available / GIB
    if memory < wanted.memory_gib:
        yield f"{memory:.1f} GiB of memory are available, SRPO_MIN_MEMORY_GIB = {wanted.memory_gib:g}"
    for folder in wanted.disk:
        try:
            place = _existing(Path(folder))
            free = shutil.disk_usage(place).free / GIB
        except OSError as error:  # of a mount that is gone
            yield f"{folder} cannot be used: {error.strerror}"
            continue
        if free < wanted.disk_gib:
            yield f"{free:.1f} GiB are free in {folder}, SRPO_MIN_DISK_GIB = {wanted.disk_gib:g}"
        if not os.access(place, os.W_OK):
            yield f"{place} cannot be written"


def all_reduce(device: str, local: int, limit: timedelta) -> float:
    """The sum of all ranks' tensors, checked; returns GB/s that each rank sends and receives (NCCL's bus bandwidth).
    Raises where it fails, is wrong, or takes long."""
    world, size = dist.get_world_size(), FLOATS[device]
    if device == "cuda":
        torch.cuda.set_device(local)
    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo", timeout=limit)
    expected, seconds = world * (world + 1) / 2, 0.0
    for number in range(1 + ROUNDS):
        tensor = torch.full((size,), float(dist.get_rank() + 1), device=device)
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _synchronize(device)
        if number:  # the first round connects the ranks
            seconds += time.perf_counter() - started
        wrong = int((tensor != expected).sum())
        if wrong:
            raise RuntimeError(f"{wrong} of {size} sums are wrong")
    return max(1.0, 2 * (world - 1) / world) * ROUNDS * size * 4 / 1e9 / seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slurm.health")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--memory-gib", type=float, default=0.0)
    parser.add_argument("--disk-gib", type=float, default=0.0)
    parser.add_argument("--disk", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=60, help="limit of the transfer")
    parser.add_argument("--meet-seconds", type=float, default=60, help="limit of the ranks' start")
    parser.add_argument("--min-bandwidth", type=float, default=0.0, help="GB/s of the all-reduce on GPUs")
    return parser.parse_args(arguments)


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _has(device: str) -> str:
    memory = f"{psutil.virtual_memory().available / GIB:.0f} GiB of memory available"
    if device == "cpu":
        return memory
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory}"


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fail(found: list[str]) -> int:
    for problem in found:
        print(f"health: {problem}", file=sys.stderr, flush=True)
    return UNHEALTHY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
