"""What a publish costs, against what it cannot cost less than.

    python -m benchmarks.weight_sync --size 30M --tp 2 --bucket-mib 16,64,256 [--placement servers] [--model DIR]
    python -m benchmarks.weight_sync --size 0.6B --placement none      # the export alone, where there is no vLLM
    python -m benchmarks.weight_sync --size 30M --lora 16              # adapters alone

Starts the ranks itself. Every figure is the median of `--repeats` publishes of the whole model into real vLLM engines.
The floor is timed in the same run, in turns: for one rank a copy of all weights, for several the bare collective that
the layout forces (one all-gather of the tensor-parallel shards, one broadcast a pipeline stage), and for servers also a
bare broadcast of all weights to as many processes as there are workers. Where vLLM computes with packed copies of the
weights (fp32 on a CPU), packing alone is timed too, and shown next to the floor.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SIZES = {  # hidden, layers, heads, key-value heads, FFN, vocabulary
    "1M": (128, 4, 4, 2, 384, 512),
    "30M": (512, 8, 8, 4, 1408, 4096),
    "135M": (576, 30, 9, 3, 1536, 49152),
    "0.6B": (1024, 28, 16, 8, 3072, 151936),
}
CONFIG = """
[run]
output_dir = "{out}"
[model]
path = "{model}"
dtype = "{dtype}"
[parallel]
tensor_model_parallel_size = {tp}
pipeline_model_parallel_size = {pp}
[data]
train = "none.jsonl"
max_prompt_length = 64
[rollout]
max_response_length = 64
enforce_eager = true
cpu_kv_cache_gib = 0.1
max_num_seqs = 16
placement = "{placement}"
num_servers = {servers}
[train]
max_tokens_per_gpu = 4096
[bridge]
verify_every = 0
[lora]
rank = {lora}
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--model", type=Path, help="a folder instead of a random model of --size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--placement", default="colocated", choices=("colocated", "servers", "none"))
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters, which are published alone")
    parser.add_argument("--bucket-mib", default="256", help="one or several, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(size: str, dtype: str, folder: Path) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, groups, ffn, vocabulary = SIZES[size]
    config = Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=64, intermediate_size=ffn, vocab_size=vocabulary, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@contextmanager
def peak_memory() -> Any:
    """Bytes by which this process's memory (the GPU's, where there is one) went above where it was; filled in at the
    end."""
    import torch

    if torch.cuda.is_available():
        found = SimpleNamespace(extra=0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.extra = torch.cuda.max_memory_allocated() - before
        return
    ctypes.CDLL(None).malloc_trim(0)  # what earlier publishes have left would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    found = SimpleNamespace(extra=0)
    before = memory("VmRSS")
    yield found
    found.extra = memory("VmHWM") - before


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def seconds(repeats: int, *actions: Callable[[], Any]) -> list[float]:
    """Each one's median, in turns, over all ranks together: they start at a barrier."""
    import torch
    import torch.distributed as dist

    def together() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()

    taken: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, times in zip(actions, taken, strict=True):
            together()
            started = time.perf_counter()
            action()
            together()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def cpu_seconds(action: Callable[[], Any], times: int) -> float:
    """CPU-seconds of one call, of this process and of all that it has started (the servers)."""
    import psutil

    me = psutil.Process()

    def spent() -> float:
        tree = [me, *me.children(recursive=True)]
        return sum(used.user + used.system for used in (process.cpu_times() for process in tree))

    before = spent()
    for _ in range(times):
        action()
    return (spent() - before) / times


def floor_of(shards: Any, total: int) -> Callable[[], None]:
    """The least that the trainer's layout forces, into memory that is there already."""
    import torch
    import torch.distributed as dist

    mine = torch.cat([p.detach().contiguous().view(-1).view(torch.uint8) for p in shards.parameters.values()])
    if shards.tp_size == 1 and shards.pp_size == 1:
        copy = torch.empty_like(mine)
        return lambda: copy.copy_(mine)
    sizes = [mine.numel()]
    if shards.pp_size > 1:
        sizes = [None] * shards.pp_size
        dist.all_gather_object(sizes, mine.numel(), group=shards.pp_group)
    stages = [mine if i == shards.pp_rank else mine.new_empty(size) for i, size in enumerate(sizes)]
    full = [mine.new_empty(shards.tp_size * size) for size in sizes]

    def collective() -> None:
        for stage, (flat, whole) in enumerate(zip(stages, full, strict=True)):
            if shards.pp_size > 1:
                dist.broadcast(flat, dist.get_global_rank(shards.pp_group, stage), group=shards.pp_group)
            if shards.tp_size > 1:
                dist.all_gather_into_tensor(whole, flat, group=shards.tp_group)

    return collective


def packing_of(engine: Any, dtype: str) -> Callable[[], None] | None:
    """What vLLM's products on a CPU force: packing each weight of this rank's engine, from memory that is there."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from megatron_srpo.rollout.vllm.layer_loading import packed_layers

    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = packed_layers(worker.get_model())
    shapes = [get_layerwise_info(layer).restore_metadata[0]["weight"].shape for layer in layers.values()]
    weights = [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]

    def pack() -> None:
        for weight in weights:
            ops.create_onednn_mm(weight.t(), 32)

    return pack if weights else None


RECEIVER = """
import sys, torch
sys.path.insert(0, {root!r})
from megatron_srpo.bridge.weight_stream import Group, GroupAddress
group = Group(GroupAddress(**{address!r}), {rank}, torch.device("cpu"))
flat = torch.empty({size}, dtype=torch.uint8)
for _ in range({times}):
    group.start_broadcast(flat).wait()
"""


@contextmanager
def bare_broadcast(size: int, workers: int, times: int) -> Any:
    """A broadcast of `size` bytes from this process to `workers` others, `times` times."""
    import torch

    from megatron_srpo.bridge.weight_stream import Sender

    sender = Sender("127.0.0.1", timeout_s=120, backend="gloo", device=torch.device("cpu"))
    address = sender.new_address("floor", workers)
    root = str(Path(__file__).parents[1])
    receivers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RECEIVER.format(root=root, address=dataclasses.asdict(address), rank=rank, size=size, times=times),
            ]
        )
        for rank in range(1, workers + 1)
    ]
    sender.join("floor", address)
    flat = torch.zeros(size, dtype=torch.uint8)
    yield lambda: sender._groups["floor"].start_broadcast(flat).wait()
    for receiver in receivers:
        receiver.wait(60)


class Memory:
    """Stands where an engine does: takes every tensor into memory that is there already."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def publish(self, exporter: Any, version: int) -> None:
        for name, tensor in exporter:
            if name not in self._held:
                self._held[name] = tensor.clone()
            else:
                self._held[name].copy_(tensor)

    def close(self) -> None:
        self._held.clear()


def measure(options: argparse.Namespace, config_file: str) -> None:
    """One rank."""
    from megatron_srpo.bridge import Exporter
    from megatron_srpo.config import load_config, read_model_folder
    from megatron_srpo.run import engines
    from megatron_srpo.run.assembly import build_policy
    from megatron_srpo.run.roles import Follower
    from megatron_srpo.run.session import open_session

    config = load_config(Path(config_file), [])
    with open_session(config) as session:
        import torch

        control = session.control
        hf = read_model_folder(config.model.path)
        policy = build_policy(config, session, trainable=False)
        if options.placement == "none":
            engine = Memory()
        elif options.placement == "servers" and control.is_driver:
            engine = engines.start_servers(config, session, str, print)
        else:
            engine = engines.build_engine(config, session, Follower(config))  # no data, no log
        shards = policy.shards.of_adapters() if options.lora else policy.shards
        total = sum(t.nbytes for _, t in Exporter(shards, hf).items())
        torch.set_num_threads(1)
        collective = floor_of(shards, total)
        for mib in map(int, options.bucket_mib.split(",")):
            exporter = Exporter(shards, hf, bucket_bytes=mib * 2**20)
            engine.publish(exporter, 1)  # fills caches and fresh pages
            actions = [collective, lambda exporter=exporter: engine.publish(exporter, 2)]
            if options.placement == "colocated" and not options.lora and (pack := packing_of(engine, options.dtype)):
                actions.append(pack)
            floor, taken, *packing = seconds(options.repeats, *actions)
            (export,) = seconds(options.repeats, lambda exporter=exporter: [None for _ in exporter])
            spent = cpu_seconds(lambda exporter=exporter: engine.publish(exporter, 2), options.repeats)
            del exporter, actions  # and the buckets' memory with it
            if options.placement == "servers":
                engine._weights = ()  # it holds them for a server that is started again
            with peak_memory() as memory_used:
                engine.publish(Exporter(shards, hf, bucket_bytes=mib * 2**20), 3)
            if options.placement == "servers":
                floor = added_floor(control, total, options, floor)
            if control.is_driver:
                say_result(options, mib, total, taken, export, floor, sum(packing), memory_used.extra, spent)
        engine.close()


def added_floor(control: Any, total: int, options: argparse.Namespace, floor: float) -> float:
    """With servers, the weights must also cross to another process."""
    import torch.distributed as dist

    if not control.is_driver:
        for _ in range(2 * options.repeats):
            dist.barrier()
        return floor
    with bare_broadcast(total, options.servers, options.repeats) as broadcast:
        return floor + seconds(options.repeats, broadcast)[0]


def say_result(
    options: argparse.Namespace,
    mib: int,
    total: int,
    taken: float,
    export: float,
    floor: float,
    packing: float,
    extra: int,
    spent: float,
) -> None:
    result = {
        "placement": options.placement, "size": options.model.name if options.model else options.size,
        "dtype": options.dtype, "tp": options.tp, "pp": options.pp, "servers": options.servers, "lora": options.lora,
        "bucket_mib": mib,
        "mib": total / 2**20, "publish_ms": 1e3 * taken, "export_ms": 1e3 * export, "floor_ms": 1e3 * floor,
        "packing_ms": 1e3 * packing, "ratio": taken / floor, "beyond_1.5_floor_ms": 1e3 * (taken - 1.5 * floor),
        "beyond_1.5_floor_and_packing_ms": 1e3 * (taken - 1.5 * (floor + packing)), "extra_mib": extra / 2**20,
        "publish_cpu_ms": 1e3 * spent,
    }  # fmt: skip
    print("RESULT", json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}), flush=True)


def main() -> None:
    options = arguments()
    if options.rank:
        measure(options, os.environ["BENCHMARK_CONFIG"])
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or make_model(options.size, options.dtype, Path(scratch) / "model")
        text = CONFIG.format(
            out=scratch, model=model.resolve(), dtype=options.dtype, tp=options.tp, pp=options.pp,
            placement="colocated" if options.placement == "none" else options.placement, servers=options.servers,
            lora=options.lora,
        )  # fmt: skip
        file = Path(scratch) / "config.toml"
        file.write_text(text)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={options.tp * options.pp}",
            "-m",
            "benchmarks.weight_sync",
            *sys.argv[1:],
            "--rank",
        ]
        environment = {**os.environ, "BENCHMARK_CONFIG": str(file), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, timeout=timedelta(minutes=15).total_seconds())


if __name__ == "__main__":
    main()
