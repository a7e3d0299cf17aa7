"""What the LM head with the loss costs, forward and backward, compared with its bare matrix products.

    python -m benchmarks.losses [--tokens 512] [--hidden 512] [--vocabulary 151936] [--dtype float32] [--json FILE]

Every way runs in turns with the three products (logits, gradient of the hidden states, of the weight), so that each
ratio is of things run side by side; on a CPU in a process of its own, for its memory. Memory is the peak beyond inputs
and gradients. Ways: eager torch; torch.compile and Liger's nearest losses on a GPU; ours with the logits once, and
with a small budget, which makes the logits twice (four products).
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.step import machine
from megatron_srpo.losses import LinearHead, full_divergence
from megatron_srpo.losses.distillation import topk_divergence

TOPK, ALPHA = 100, 0.5
SMALL_BUDGET = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}  # bytes of logits at a time in the low-memory setting


def _case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    given = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    weight = (torch.randn(vocabulary, hidden, **given) * hidden**-0.5).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros(vocabulary, hidden, device=device)  # fp32, as Megatron's DDP keeps it
    weight.grad = torch.zeros_like(weight)
    states = torch.randn(tokens, hidden, **given).to(dtype).requires_grad_()
    states.grad = torch.zeros_like(states)
    ids = torch.randint(0, vocabulary, (tokens, 1 + TOPK), **given)
    teacher = torch.randn(tokens, TOPK, **given) - 6
    return {"hidden": states, "weight": weight, "ids": ids, "teacher": teacher}


def bare(hidden: Tensor, weight: Tensor, **unused: Tensor) -> None:
    """The three products that no way can avoid."""
    with torch.no_grad():
        logits = hidden @ weight.T
        torch.mm(logits, weight, out=hidden.grad)
        if weight.dtype == torch.float32:
            weight.main_grad.addmm_(logits.T, hidden)
        else:
            torch.mm(logits.T, hidden, out=weight.grad)


def _eager_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, ids), entropy


def _policy(logprobs: Tensor, entropy: Tensor) -> Tensor:
    return logprobs[:, 0].sum() + entropy.detach().sum()


def _divergence(logprobs: Tensor, teacher: Tensor) -> Tensor:
    return topk_divergence(logprobs[:, 1:], teacher, ALPHA, tail=True).sum()


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, **unused: Tensor) -> None:
    _policy(*_eager_logprobs(hidden, weight, ids[:, :1])).backward()


def eager_topk(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor) -> None:
    logprobs, entropy = _eager_logprobs(hidden, weight, ids)
    (_policy(logprobs, entropy) + _divergence(logprobs, teacher)).backward()


def compiled_topk(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor) -> None:
    logprobs, entropy = _compiled()(hidden, weight, ids)
    (_policy(logprobs, entropy) + _divergence(logprobs, teacher)).backward()


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_eager_logprobs)


def compiled(hidden: Tensor, weight: Tensor, ids: Tensor, **unused: Tensor) -> None:
    _policy(*_compiled()(hidden, weight, ids[:, :1])).backward()


def liger_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, **unused: Tensor) -> None:
    """The nearest of Liger's to log-probs: the cross entropy with the head fused in; it has no entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, ids[:, 0]).backward()


def liger_jsd(hidden: Tensor, weight: Tensor, ids: Tensor, **unused: Tensor) -> None:
    """The nearest of Liger's: full-vocabulary JSD with the head fused in, student and teacher of one size."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    LigerFusedLinearJSD(jsd_beta=ALPHA)(hidden, weight, hidden.detach().flip(0), weight.detach(), None).backward()


def our_jsd(hidden: Tensor, weight: Tensor, ids: Tensor, **unused: Tensor) -> None:
    """The same divergence as Liger's: all logits of student and teacher, as the trainer has them."""
    with torch.no_grad():
        teacher = LinearHead(hidden.flip(0), weight, weight.size(0)).logits()
    student = LinearHead(hidden, weight, weight.size(0)).logits()
    full_divergence(student, teacher, ALPHA, group=None).sum().backward()


@torch.no_grad()
def eager_ids(hidden: Tensor, weight: Tensor, **unused: Tensor) -> Tensor:
    return (hidden @ weight.T).topk(TOPK).indices


def our_ids(hidden: Tensor, weight: Tensor, **unused: Tensor) -> Tensor:
    """The top-k pass of distilled rows: the head's product alone, without gradient."""
    return LinearHead(hidden.detach(), weight, weight.size(0)).topk(TOPK)


def _ours(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, *, topk: bool, small: bool) -> None:
    budget = SMALL_BUDGET[hidden.device.type] if small else 2**40
    head = LinearHead(hidden, weight, weight.size(0), budget_bytes=budget)
    logprobs, entropy = head.gather_logprobs(ids if topk else ids[:, :1])
    loss = _policy(logprobs, entropy)
    (loss + _divergence(logprobs, teacher) if topk else loss).backward()


WAYS: dict[str, Callable] = {
    "log-prob and entropy, eager": eager,
    "log-prob and entropy, torch.compile": compiled,
    "log-prob alone, Liger": liger_cross_entropy,
    "log-prob and entropy, ours": partial(_ours, topk=False, small=False),
    "log-prob and entropy, ours, small": partial(_ours, topk=False, small=True),
    "+ top-100 and tail, eager": eager_topk,
    "+ top-100 and tail, torch.compile": compiled_topk,
    "+ top-100 and tail, ours": partial(_ours, topk=True, small=False),
    "+ top-100 and tail, ours, small": partial(_ours, topk=True, small=True),
    "full JSD, Liger": liger_jsd,
    "full JSD, ours": our_jsd,
    "top-100 ids, no gradient, eager": eager_ids,
    "top-100 ids, no gradient, ours": our_ids,
}
GPU_ONLY = [name for name in WAYS if "Liger" in name or "compile" in name]


def _reset_peak(device: str) -> int:
    """Bytes in use now; the peak counts from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _timed(way: Callable, case: dict[str, Tensor], device: str) -> float:
    """Seconds: of this process on a CPU, of the device on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        way(**case)
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    way(**case)
    return time.process_time() - started


def measure(name: str, tokens: int, hidden: int, vocabulary: int, dtype: str, repeats: int) -> dict[str, float]:
    """One way in this process: seconds, its ratio to the products, and bytes beyond inputs and gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = _case(tokens, hidden, vocabulary, getattr(torch, dtype), device)
    way = WAYS[name]
    if device == "cuda":  # kernels are compiled for this size
        way(**case)
    else:
        small = _case(8, hidden, 512, getattr(torch, dtype), device)
        way(**(small | {"ids": small["ids"] % 512}))  # libraries allocate on first use
    before = _reset_peak(device)
    way(**case)
    extra = _peak(device) - before
    mine, products = [], []
    for _ in range(repeats):
        products.append(_timed(bare, case, device))
        mine.append(_timed(way, case, device))
    return {
        "seconds": statistics.median(mine),
        "ratio": statistics.median(mine) / statistics.median(products),
        "extra_bytes": extra,
        "products_seconds": statistics.median(products),
    }


def _apart(name: str, given: dict[str, int | str]) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.losses", f"--way={name}"]
    command += [f"--{option}={value}" for option, value in given.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    tokens: Annotated[int, typer.Option(help="rows of the product")] = 512,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    vocabulary: Annotated[int, typer.Option(help="columns of the product")] = 151_936,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    repeats: Annotated[int, typer.Option(help="repetitions; the median counts")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
    way: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """The table of all ways."""
    if way:
        print(json.dumps(measure(way, tokens, hidden, vocabulary, dtype, repeats)))
        return
    given = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "dtype": dtype, "repeats": repeats}
    table = Table(title=f"{machine()}; T {tokens}, H {hidden}, V {vocabulary}, {dtype}", title_justify="left")
    for column in ("forward and backward", "seconds", "÷ three products", "extra MiB"):
        table.add_column(column, justify="left" if column.startswith("forward") else "right")
    figures = {}
    for name in WAYS:
        if name in GPU_ONLY and not torch.cuda.is_available():
            continue
        try:
            figures[name] = found = measure(name, **given) if torch.cuda.is_available() else _apart(name, given)
        except (RuntimeError, TypeError, ImportError) as error:  # out of memory, not installed, changed
            table.add_row(name, "–", "–", (str(error).strip() or repr(error)).splitlines()[-1][:60])
            continue
        seconds = f"{found['seconds']:.4f}" if torch.cuda.is_available() else f"{found['seconds']:.3f}"
        table.add_row(name, seconds, f"{found['ratio']:.2f}", f"{found['extra_bytes'] / 2**20:,.0f}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
