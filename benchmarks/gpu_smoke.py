"""What one GPU without vLLM can tell of a run, in eight minutes on an H200:

    python -m benchmarks.gpu_smoke [--hidden 2048] [--layers 28] [--minutes 8]
    python -m benchmarks.gpu_smoke --rehearse      # the same code on a CPU, with a tiny model; its figures mean nothing

- rotary embedding: its share of a train step for rows of 2, 9, 36 and 72 sequences, with the form that runs use and, if
  that is our one-pass form, with Megatron's loop over sequences;
- checkpoint: seconds of snapshot, write and load, and the peak of the device's memory while it is loaded;
- offload: seconds of moving the trainer to the host and back;
- an NCCL group whose peer never comes: it must be an error within its limit.

Every part prints its line when it is done, so that a run that is cut short has said what it knows. It has run as a
rehearsal only.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import torch.distributed as dist
import typer
from megatron.core.transformer import attention

from benchmarks.losses import _peak, _reset_peak
from benchmarks.step import machine
from benchmarks.teacher_swap import _policy
from megatron_srpo.config import Config
from megatron_srpo.core.tensors import PackedBatch
from megatron_srpo.losses import LinearHead
from megatron_srpo.mcore import checkpoint, groups, rotary
from megatron_srpo.mcore.device import choose_device
from megatron_srpo.mcore.policy import Policy
from megatron_srpo.run.cli import run_alone
from megatron_srpo.run.gpu_checks import absent_peer

SEQUENCES = (2, 9, 36, 72)  # per row


def row_of(tokens: int, sequences: int, vocabulary: int) -> PackedBatch:
    """A packed row of equal sequences."""
    length = tokens // sequences
    ids = torch.randint(0, vocabulary, (length * sequences,), generator=torch.Generator().manual_seed(sequences))
    zeros = torch.zeros(len(ids))
    bounds = torch.arange(0, len(ids) + 1, length, dtype=torch.int32)
    positions = torch.arange(length).repeat(sequences)
    return PackedBatch(ids, ids.roll(-1), positions, bounds, torch.ones(len(ids)), zeros, zeros, zeros)


def loss(given: object, row: PackedBatch) -> tuple[torch.Tensor, dict]:
    logprobs = LinearHead(**vars(given)).gather_logprobs(row.targets[:, None])[0]
    return -logprobs.mean(), {}


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of one call, after one that is not counted."""
    taken = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def rotary_shares(policy: Policy, tokens: int, vocabulary: int) -> None:
    """The step without any rotary embedding is the base; what a form adds to it is its share."""
    fused = policy.runner.config.apply_rope_fusion
    forms = {"fused" if fused else "one pass": attention.apply_rotary_pos_emb}
    if not fused:
        forms["Megatron's loop"] = rotary._megatrons
    for sequences in SEQUENCES:
        row = row_of(tokens, sequences, vocabulary)
        with patch.object(attention, "apply_rotary_pos_emb", lambda t, *unused, **also: t):
            base = seconds_of(lambda row=row: policy.train_step([row], loss))
        for name, form in forms.items():
            with patch.object(attention, "apply_rotary_pos_emb", form):
                whole = seconds_of(lambda row=row: policy.train_step([row], loss))
            share = max(0.0, 1 - base / whole)
            print(
                f"rotary, {sequences} sequences in {tokens} tokens, {name}: {whole * 1e3:.1f} ms, {share:.1%}",
                flush=True,
            )


def checkpoints(policy: Policy, kind: str) -> None:
    size = sum(parameter.numel() for parameter in policy.shards.parameters.values())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        snapshot = checkpoint.snapshot(policy, folder)
        copied = time.perf_counter()
        snapshot.write()
        snapshot.write_index([snapshot.results])
        written = time.perf_counter()
        stored = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"checkpoint of {size / 1e9:.3f} B parameters, {stored / 1e9:.2f} GB: copied in {copied - started:.2f} s, "
            f"written in {written - copied:.2f} s", flush=True,
        )  # fmt: skip
        before = _reset_peak(kind)
        started = time.perf_counter()
        checkpoint.load(policy, folder)
        peak = _peak(kind) - before
        print(
            f"loaded in {time.perf_counter() - started:.2f} s; {peak / 2**20:.0f} MiB of the device beyond what was "
            f"held ({peak / size:.2f} bytes per parameter)", flush=True,
        )  # fmt: skip


def offload(policy: Policy) -> None:
    started = time.perf_counter()
    with policy.on_host():
        away = time.perf_counter()
    back = time.perf_counter()
    print(f"offload: to the host {away - started:.2f} s, back {back - away:.2f} s (first time)", flush=True)
    started = time.perf_counter()
    with policy.on_host():
        away = time.perf_counter()
    print(f"offload: to the host {away - started:.2f} s, back {time.perf_counter() - away:.2f} s (again)", flush=True)


def main(
    hidden: Annotated[int, typer.Option()] = 2048,
    layers: Annotated[int, typer.Option()] = 28,
    tokens: Annotated[int, typer.Option(help="of a row")] = 18432,
    vocabulary: Annotated[int, typer.Option()] = 151_936,
    minutes: Annotated[float, typer.Option(help="no part begins after this time")] = 8.0,
    rehearse: Annotated[bool, typer.Option(help="on a CPU, with a tiny model")] = False,
) -> None:
    """Print a line per figure."""
    run_alone()
    if rehearse:
        hidden, layers, tokens, vocabulary = 64, 2, 288, 512
    deadline = time.monotonic() + 60 * minutes
    path = choose_device("cpu" if rehearse else "cuda", groups.local_rank())
    config = Config(model={"path": "random", "dtype": "float32" if rehearse else "bfloat16"}, data={"train": "unused"})
    topology = groups.initialize(config.parallel, path, seed=0, timeout_minutes=10)
    sizes = {"hidden": hidden, "layers": layers, "vocabulary": vocabulary, "dtype": config.model.dtype}
    policy = _policy(config, topology, path, **sizes)
    print(f"{machine()}; {path}; hidden {hidden}, {layers} layers", flush=True)
    for part in (
        lambda: print("absent peer:", *absent_peer(path.device.type), flush=True),
        lambda: rotary_shares(policy, tokens, vocabulary),
        lambda: checkpoints(policy, path.device.type),
        lambda: offload(policy),
    ):
        if time.monotonic() < deadline:
            part()
    dist.barrier()
    groups.shutdown()


if __name__ == "__main__":
    typer.run(main)
