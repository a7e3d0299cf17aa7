"""What this machine reaches, for the planner: products, attention, memory, collectives, and one small real train step.

    python -m benchmarks.calibrate machine.json                 # measures and writes
    python -m megatron_srpo plan MODEL --gpus N --gpu h100 --calibration machine.json

The file replaces the planner's assumed efficiencies by measured ones. The host's overhead a layer is what is left of a
small model's real train step (Policy.train_step) after its products, attention and memory traffic are taken away; the
check is the prediction of another, larger model's step, measured the same way and reported with its error.

On a CPU, computation is timed in CPU seconds of one thread, so that neighbours do not matter; collectives in seconds.
On a GPU the models are shipped architectures with rows of 8,192 tokens, and their memory is compared with the plan's.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import typer

from megatron_srpo.plan import Architecture, Layout, Machine, Workload, machine_of
from megatron_srpo.plan.activations import stage_activations
from megatron_srpo.plan.architecture import read_architecture
from megatron_srpo.plan.duration import Pass, optimizer_seconds, pass_seconds
from megatron_srpo.plan.memory import persistent_lines
from megatron_srpo.run.cli import run_alone

SIZES = {  # Qwen3 models: the first calibrates, the others are predicted
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384, "vocab_size": 2048},
    "wide": {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1536, "vocab_size": 8192},
    "deep": {"hidden_size": 256, "num_hidden_layers": 12, "intermediate_size": 768, "vocab_size": 4096},
}
GPU_SIZES = {  # shipped architecture, and what is recomputed; the last has 83 GiB that stay
    "Qwen3-0.6B": "none",
    "Qwen3-1.7B": "none",
    "Qwen3-1.7B, full recompute": "full",
    "Qwen3-4B, full recompute": "full",
}
ROW = 8192 if torch.cuda.is_available() else 512
ROWS = 2
LOGITS_MIB = 1024


def seconds_of(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median; CPU seconds without a GPU, else seconds of finished work."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    times = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        started = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(clock() - started)
    return statistics.median(times[1:])


def rates(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of products and of causal attention, bytes/s of memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, hidden = (16384, 8192) if device == "cuda" else (ROW, 512)
    a = torch.randn(tokens, hidden, dtype=dtype, device=device)
    b = torch.randn(hidden, 3 * hidden, dtype=dtype, device=device)
    product = 2 * tokens * hidden * 3 * hidden / seconds_of(lambda: a @ b)
    heads, length = (32, 8192) if device == "cuda" else (4, ROW)
    q = torch.randn(1, heads, length, 128 if device == "cuda" else 32, dtype=dtype, device=device)
    attention = 2 * heads * length * length * q.size(-1)
    attention /= seconds_of(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    big = torch.zeros(2**28 if device == "cuda" else 2**24, dtype=torch.float32, device=device)
    other = torch.empty_like(big)
    return {"product": product, "attention": attention, "memory": 2 * big.nbytes / seconds_of(lambda: other.copy_(big))}


def _collective(rank: int, ranks: int, port: int, results: Any) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    device = "cuda" if cuda else "cpu"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=rank, world_size=ranks)
    small, large = torch.zeros(8, device=device), torch.zeros(2**28 if cuda else 2**22, device=device)
    times = []
    for tensor in (small, large):
        gathered = torch.empty(ranks * tensor.numel(), device=device)
        best = float("inf")
        for _ in range(10):
            dist.barrier()
            started = time.perf_counter()
            dist.all_gather_into_tensor(gathered, tensor)
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        times.append(best)
    if rank == 0:
        results.put({"latency": times[0], "link": (ranks - 1) * large.nbytes / max(1e-9, times[1] - times[0])})
    dist.destroy_process_group()


def collectives(ranks: int, port: int) -> dict[str, float]:
    """Seconds of an empty all-gather, and bytes/s that a rank receives in a large one; the best of ten."""
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_collective, (ranks, port, results), ranks)
    return results.get()


def make_model(folder: Path, size: dict[str, int], dtype: torch.dtype) -> Path:
    """A random Qwen3 of that size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **size, num_attention_heads=size["hidden_size"] // 32, num_key_value_heads=size["hidden_size"] // 64,
        head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Step:
    """A measured train step; bytes of what stays, and at the most before the optimizer and in it (0 on a CPU)."""

    seconds: float
    stays: int = 0
    peak: int = 0
    optimizer_peak: int = 0


def train_step(hf: dict[str, Any], load: Callable[[Any], None], dtype: str, recompute: str = "none") -> Step:
    """Of the trainer's own policy on one rank: ROWS packed rows of two sequences, and the optimizer."""
    from megatron_srpo.config import Config
    from megatron_srpo.core.tensors import PackedBatch
    from megatron_srpo.losses import LinearHead
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy

    start = torch.cuda.memory_allocated()  # 0 on a CPU
    model = {"path": "given", "dtype": dtype, "recompute": recompute}
    config = Config.model_validate({"model": model, "data": {"train": "unused"}})
    path = choose_device("auto", 0)
    topology = groups.initialize(config.parallel, path, seed=0, timeout_minutes=5)
    policy = Policy(config, hf, topology, path, load, total_steps=100)
    ids = torch.randint(0, 1000, (ROW,))
    bounds = torch.tensor([0, ROW // 2, ROW], dtype=torch.int32)
    zeros = torch.zeros(ROW)
    row = PackedBatch(ids, ids.roll(-1), torch.arange(ROW), bounds, torch.ones(ROW), zeros, zeros, zeros)

    def loss(head: Any, batch: PackedBatch) -> Any:
        whole = LinearHead(**vars(head), budget_bytes=LOGITS_MIB * 2**20)
        return -whole.gather_logprobs(batch.targets[:, None])[0].sum() / ROW, {}

    def call() -> None:
        policy.train_step([row] * ROWS, loss)

    try:
        seconds = seconds_of(call)
        if path.device.type != "cuda":
            return Step(seconds)
        stays = torch.cuda.memory_allocated() - start
        step, before = policy.optimizer.step, []

        def watched(lr: float) -> float:
            before.append(torch.cuda.max_memory_allocated() - start)
            torch.cuda.reset_peak_memory_stats()
            return step(lr)

        policy.optimizer.step = watched
        torch.cuda.reset_peak_memory_stats()
        call()
        return Step(seconds, stays, before[0], torch.cuda.max_memory_allocated() - start)
    finally:
        groups.shutdown()


def predicted(arch: Architecture, machine: Machine, layout: Layout, path: str) -> float:
    """The same step by the planner's formulas."""
    workload = Workload(packing=1.0, imbalance=0.0)
    work = Pass(ROW * ROWS, ROW / 2, backward=True)
    adam = sum(optimizer_seconds(arch, layout, machine))
    return pass_seconds(arch, layout, machine, workload, work, path=path, logits_mib=LOGITS_MIB)[0] + adam


def predicted_memory(arch: Architecture, layout: Layout, path: str) -> tuple[float, float]:
    """Bytes of what stays, and with the activations of the fullest moment."""
    stays = sum(persistent_lines(arch, layout, 0).values())
    return stays, stays + sum(stage_activations(arch, layout, 0, ROW, ROWS, path=path, logits_mib=LOGITS_MIB))


def models(dtype: str, scratch: Path) -> Iterator[tuple[str, Architecture, str, Callable[[], Step]]]:
    """Name, numbers, recompute setting and the measurement of each model."""
    from megatron_srpo.bridge import load_hf_weights, read_config

    if torch.cuda.is_available():  # weights as Megatron initialises them
        for name, recompute in GPU_SIZES.items():
            arch, hf = read_architecture(name.partition(",")[0])
            yield name, arch, recompute, functools.partial(train_step, hf, lambda shards: None, dtype, recompute)
        return
    for name, size in SIZES.items():
        folder = make_model(scratch / name, size, getattr(torch, dtype))
        load = functools.partial(load_hf_weights, hf_dir=folder)
        hf = read_config(folder)
        yield name, Architecture.from_hf(hf, name), "none", functools.partial(train_step, hf, load, dtype)


def main(
    file: Annotated[Path, typer.Argument(help="where the measured machine goes")],
    gpu: Annotated[str, typer.Option(help="whose peaks and memory are taken, on a GPU")] = "h100",
    dtype: Annotated[str, typer.Option(help="of the model: float32 or bfloat16")] = "",
    ranks: Annotated[int, typer.Option(help="of the collectives; 1: not measured")] = 2,
    port: Annotated[int, typer.Option()] = 29741,
) -> None:
    """Measure, write FILE, and print how well it predicts models that it has not seen."""
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    dtype = dtype or ("bfloat16" if cuda else "float32")
    found = rates(getattr(torch, dtype))
    if ranks > 1:
        found |= collectives(ranks, port)
    machine = _machine(found, gpu if cuda else None)
    itemsize = torch.finfo(getattr(torch, dtype)).bits // 8
    path = ("te" if _has_te() else "gpu") if cuda else "local"
    run_alone()
    report = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, arch, recompute, measure) in enumerate(models(dtype, Path(scratch))):
            layout = Layout(1, max_tokens=ROW, dtype_bytes=itemsize, recompute=recompute)
            step = measure()
            gc.collect()  # the policy is one large cycle
            guess = predicted(arch, machine, layout, path)
            if number == 0:  # a forward pass and a backward pass of two: three times a layer and row
                overhead = max(0.0, (step.seconds - guess) / (3 * ROWS * arch.layers))
                machine = dataclasses.replace(machine, layer_overhead=overhead)
                guess = predicted(arch, machine, layout, path)
            report.append(
                {"model": name, "parameters": arch.parameters, "measured_s": step.seconds, "predicted_s": guess}
            )
            how = ", calibrated on it" if number == 0 else ""
            print(
                f"{name}: {arch.parameters / 1e6:.1f} M parameters, measured {step.seconds:.3f} s, "
                f"predicted {guess:.3f} s ({guess / step.seconds - 1:+.0%}){how}"
            )
            if step.peak:
                stays, peak = predicted_memory(arch, layout, path)
                report[-1] |= dataclasses.asdict(step) | {"predicted_stays": stays, "predicted_peak": peak}
                print(
                    f"  stays {step.stays / 2**30:.2f} GiB (predicted {stays / step.stays - 1:+.1%}), at the most "
                    f"{step.peak / 2**30:.2f} (predicted {peak / step.peak - 1:+.1%}); in Adam "
                    f"{step.optimizer_peak / 2**30:.2f}"
                )
    file.write_text(json.dumps({"machine": _changed(machine, gpu if cuda else None), "check": report}, indent=1))
    print(json.dumps(_changed(machine, gpu if cuda else None), indent=1))


def _has_te() -> bool:
    import importlib.util

    return importlib.util.find_spec("transformer_engine") is not None


def _machine(found: dict[str, float], gpu: str | None) -> Machine:
    """The measured machine: shares of a known GPU's peaks, or a CPU whose peaks are what was measured."""
    talk = {"latency": found["latency"]} if "latency" in found else {}
    source = "measured by benchmarks/calibrate.py"
    if gpu is not None:
        known = machine_of(gpu)
        if "link" in found:
            talk["link_share"] = found["link"] / known.link
        return dataclasses.replace(
            known, product_share=found["product"] / known.flops, attention_share=found["attention"] / known.flops,
            bandwidth_share=found["memory"] / known.bandwidth, source=source, **talk,
        )  # fmt: skip
    link = found.get("link", 1e9)
    return Machine(
        "cpu", found["product"], 16 * 2**30, found["memory"], link, link, product_share=1.0, bandwidth_share=1.0,
        attention_share=found["attention"] / found["product"], link_share=1.0, network_share=1.0, reserved=0.0,
        source=source, **talk,
    )  # fmt: skip


def _changed(machine: Machine, gpu: str | None) -> dict[str, Any]:
    """What the file holds: on a GPU only what was measured, so that its peaks stay those of the table."""
    fields = dataclasses.asdict(machine)
    known = dataclasses.asdict(machine_of(gpu)) if gpu is not None else {}
    return {name: value for name, value in fields.items() if known.get(name) != value}


if __name__ == "__main__":
    typer.run(main)
