"""What the teacher's weights cost: the swap in and out, the EMA update, and the memory of both.

    python -m benchmarks.teacher_swap [--hidden 512] [--layers 8] [--dtype bfloat16] [--offload] [--lora-rank 16]
    torchrun --nproc-per-node 2 -m benchmarks.teacher_swap --tp 2

The model is a random Qwen3 of that size. Ratios are to one plain copy of this rank's fp32 slices, timed in turns with
them. A bf16 swap writes the model's slices twice (teacher in, student back); an fp32 one exchanges them twice; with
several data-parallel ranks a gather of the parameters follows each time.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import typer

from benchmarks.losses import _peak, _reset_peak
from benchmarks.step import machine
from megatron_srpo.bridge import load_weights, read_config
from megatron_srpo.config import Config
from megatron_srpo.mcore import groups
from megatron_srpo.mcore.device import choose_device
from megatron_srpo.mcore.policy import Policy
from megatron_srpo.run.cli import run_alone


def _random_model(folder: Path, hidden: int, layers: int, vocabulary: int, dtype: str, experts: int = 0) -> None:
    """A random Qwen3; with `experts` a mixture of so many, two for each token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": max(2, hidden // 64), "num_key_value_heads": 2, "head_dim": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if experts:
        more = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
        made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **more))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**sizes))
    made.to(getattr(torch, dtype)).save_pretrained(folder)


def _policy(config: Config, topology: groups.Topology, path: object, **sizes: object) -> Policy:
    with tempfile.TemporaryDirectory() as scratch:
        folder = [scratch]
        dist.broadcast_object_list(folder, src=0, group=topology.control_group)
        if topology.is_driver:
            _random_model(Path(scratch), **sizes)
        dist.barrier(group=topology.control_group)
        load = partial(load_weights, hf_dir=folder[0], lora=config.lora)
        policy = Policy(config, read_config(folder[0]), topology, path, load, total_steps=1)
        dist.barrier(group=topology.control_group)  # the driver removes the folder
    return policy


def _medians(repeats: int, *ways: Callable[[], object]) -> list[float]:
    """Seconds of each way, in turns; the slowest rank's."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, seconds in zip(ways, found, strict=True):
            dist.barrier()
            started = time.perf_counter()
            way()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            slowest = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds.append(float(slowest))
    return [statistics.median(seconds) for seconds in found]


def main(
    hidden: Annotated[int, typer.Option()] = 512,
    layers: Annotated[int, typer.Option()] = 8,
    vocabulary: Annotated[int, typer.Option()] = 16384,
    dtype: Annotated[str, typer.Option(help="of the model; the shadow is fp32")] = "bfloat16",
    tp: Annotated[int, typer.Option(help="tensor parallel size; the other ranks are data parallel")] = 1,
    offload: Annotated[bool, typer.Option(help="the shadow in host memory")] = False,
    lora_rank: Annotated[int, typer.Option(help="of adapters, which alone are trained; 0: all weights")] = 0,
    repeats: Annotated[int, typer.Option()] = 9,
) -> None:
    """Print bytes, seconds and ratios on rank 0."""
    run_alone()
    path = choose_device("auto", groups.local_rank())
    config = Config(
        model={"path": "random", "dtype": dtype}, data={"train": "unused"}, teacher={"offload": offload},
        parallel={"tensor_model_parallel_size": tp}, lora={"rank": lora_rank},
    )  # fmt: skip
    topology = groups.initialize(config.parallel, path, seed=0, timeout_minutes=10)
    policy = _policy(config, topology, path, hidden=hidden, layers=layers, vocabulary=vocabulary, dtype=dtype)
    shadow, mains = policy.shadows["teacher"], [shard.main.detach() for shard in policy.optimizer.shards()]
    spare = [torch.zeros_like(main) for main in mains]

    def copy() -> None:
        for there, main in zip(spare, mains, strict=True):
            there.copy_(main)

    def swap() -> None:
        with policy.weights("teacher"):
            pass

    swap()
    before = _reset_peak(path.device.type)
    swap()
    extra = _peak(path.device.type) - before
    ways = {
        "swap in and out": swap,
        "EMA update": partial(shadow.update, 0.05),
        "gather": policy.optimizer.gather_model,
    }
    plain, *seconds = _medians(repeats, copy, *ways.values())
    if topology.is_driver:
        total = sum(p.numel() for p in policy.shards.parameters.values()) * tp
        size = sum(part.nbytes for part in shadow.slices)
        print(f"{machine()}; {topology.world_size} rank(s), tp {tp}, {total / 1e6:.1f} M parameters, {dtype}")
        print(f"shadow: {size / 2**20:.1f} MiB a rank; beyond it at the swap: {extra / 2**20:.1f} MiB")
        for name, taken in zip(ways, seconds, strict=True):
            print(f"{name}: {taken * 1e3:.1f} ms, {taken / plain:.1f} × a plain copy of it ({plain * 1e3:.1f} ms)")
    groups.shutdown()


if __name__ == "__main__":
    typer.run(main)
