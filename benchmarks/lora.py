"""What adapters save: memory of a rank and CPU-seconds of an optimizer step, beside training all weights.

    python -m benchmarks.lora [--size 30M] [--rank 16] [--repeats 3]

Each form runs in a process of its own, in turns: a random Qwen3 of that size on one rank in fp32, an SRPO step of 4
prompts × 8 responses with its scoring passes, the teacher an average of the weights. Memory is what the process uses
beyond its state before the model was built: at rest (weights, gradients, optimizer, teacher) and at the step's peak.
`python -m benchmarks.weight_sync --lora RANK` measures publishes.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.shared_prompts import made_up, timed_step
from benchmarks.step import machine
from benchmarks.weight_sync import SIZES, make_model, memory

LENGTHS = 64, 64  # tokens of a prompt and of a response


def measure(size: str, rank: int) -> dict[str, float]:
    """One form, in this process."""
    from megatron_srpo.batching import plan_batch, share_of
    from megatron_srpo.bridge import load_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy
    from megatron_srpo.run.cli import run_alone

    run_alone()
    torch.set_num_threads(1)
    config = Config(
        model={"path": "unused", "dtype": "float32"}, data={"train": "unused"}, lora={"rank": rank},
        algorithm={"name": "srpo", "sibling": "shortest"}, optimizer={"lr": 1e-5},
    )  # fmt: skip
    path = choose_device("cpu", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(size, "float32", Path(scratch))
        ctypes.CDLL(None).malloc_trim(0)
        before = memory("VmRSS")
        load = partial(load_weights, hf_dir=str(folder), lora=config.lora)
        policy = Policy(config, read_config(folder), topology, path, load, total_steps=100)
    routed = made_up(config, 4, 8, *LENGTHS, SIZES[size][-1])
    plan = plan_batch(routed, dp_size=1, max_tokens=4096, padding=policy.padding, drop_zero_gradient=True)
    mine, share = share_of([sample for group in routed for sample in group], plan, 0)

    def step() -> float:
        return timed_step(config, policy, mine, share)[1]

    step()  # Adam's moments exist afterwards
    ctypes.CDLL(None).malloc_trim(0)
    rest = memory("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")
    seconds = [step(), step()]
    return {"rest": rest / 2**20, "peak": (memory("VmHWM") - before) / 2**20, "seconds": statistics.median(seconds)}


def main(
    size: str = "30M",
    rank: int = 16,
    repeats: int = 3,
    form: Annotated[int | None, typer.Option(hidden=True, help="Measure this rank of adapters here.")] = None,
) -> None:
    if form is not None:
        print("RESULT", json.dumps(measure(size, form)))
        return
    found: dict[int, list[dict[str, float]]] = {0: [], rank: []}
    for _ in range(repeats):
        for adapters, results in found.items():
            command = [sys.executable, "-m", "benchmarks.lora", "--size", size, "--form", str(adapters)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.rpartition("RESULT")[2]))
    table = Table("", "all weights", f"adapters of rank {rank}", "ratio")
    for name, label in (("rest", "MiB at rest"), ("peak", "MiB at the peak"), ("seconds", "CPU-seconds of a step")):
        full, lora = (statistics.median(one[name] for one in results) for results in found.values())
        form_of = "{:.2f}" if name == "seconds" else "{:,.0f}"
        table.add_row(label, form_of.format(full), form_of.format(lora), f"{lora / full:.2f}")
    Console().print(f"{machine()}; {size}, fp32, medians of {repeats} processes in turns")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
