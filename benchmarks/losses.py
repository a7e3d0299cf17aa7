"""What the LM head with the loss costs, forward and backward, beside its bare matrix products.

    python -m benchmarks.losses [--tokens 512] [--hidden 512] [--vocabulary 151936] [--dtype float32] [--json FILE]

Every way runs in a process of its own, in turns with the three products (logits, gradient of the hidden states, of the
weight), so that each ratio is of things run side by side. Memory is the peak beyond inputs and gradients. Ways: eager
torch; torch.compile and Liger's nearest loss on a GPU; ours with the logits once; ours with a small budget.
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
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.step import machine
from megatron_srpo.losses import LinearHead
from megatron_srpo.losses.sdpo import topk_divergence

TOPK, ALPHA = 100, 0.5
SMALL_BUDGET = 48 * 2**20  # bytes of logits at a time in the low-memory setting


def _case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocabulary, hidden, generator=g) * hidden**-0.5).to(device, dtype).requires_grad_()
    weight.main_grad = torch.zeros(vocabulary, hidden, device=device)  # fp32, as Megatron's DDP keeps it
    weight.grad = torch.zeros_like(weight)
    states = torch.randn(tokens, hidden, generator=g).to(device, dtype).requires_grad_()
    states.grad = torch.zeros_like(states)
    ids = torch.randint(0, vocabulary, (tokens, 1 + TOPK), generator=g).to(device)
    teacher = (torch.randn(tokens, TOPK, generator=g) - 6).to(device)
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


def liger_jsd(hidden: Tensor, weight: Tensor, ids: Tensor, **unused: Tensor) -> None:
    """The nearest of Liger's: full-vocabulary JSD with the head fused in, student and teacher of one size."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    LigerFusedLinearJSD(jsd_beta=ALPHA)(hidden, weight, hidden.detach(), weight.detach()).backward()


def _ours(budget: int, hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor | None) -> None:
    head = LinearHead(hidden, weight, weight.size(0), budget_bytes=budget)
    logprobs, entropy = head.gather_logprobs(ids if teacher is not None else ids[:, :1])
    loss = _policy(logprobs, entropy)
    (loss if teacher is None else loss + _divergence(logprobs, teacher)).backward()


WAYS: dict[str, Callable] = {
    "log-prob and entropy, eager": eager,
    "log-prob and entropy, ours": lambda hidden, weight, ids, teacher: _ours(2**40, hidden, weight, ids, None),
    "log-prob and entropy, ours, small": lambda hidden, weight, ids, teacher: _ours(
        SMALL_BUDGET, hidden, weight, ids, None
    ),
    "+ top-100 and tail, eager": eager_topk,
    "+ top-100 and tail, torch.compile": compiled_topk,
    "+ top-100 and tail, ours": lambda **case: _ours(2**40, **case),
    "+ top-100 and tail, ours, small": lambda **case: _ours(SMALL_BUDGET, **case),
    "full JSD, Liger": liger_jsd,
}
GPU_ONLY = ("full JSD, Liger", "+ top-100 and tail, torch.compile")


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


def main(
    tokens: Annotated[int, typer.Option(help="rows of the product")] = 512,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    vocabulary: Annotated[int, typer.Option(help="columns of the product")] = 151_936,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    repeats: Annotated[int, typer.Option(help="of which the median counts")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
    way: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """The table of all ways."""
    if way:
        print(json.dumps(measure(way, tokens, hidden, vocabulary, dtype, repeats)))
        return
    given = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "dtype": dtype, "repeats": repeats}
    sizes = [f"--{name}={value}" for name, value in given.items()]
    table = Table(title=f"{machine()}; T {tokens}, H {hidden}, V {vocabulary}, {dtype}", title_justify="left")
    for column in ("forward and backward", "seconds", "÷ three products", "extra MiB"):
        table.add_column(column, justify="left" if column.startswith("forward") else "right")
    figures = {}
    for name in WAYS:
        if name in GPU_ONLY and not torch.cuda.is_available():
            continue
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.losses", *sizes, f"--way={name}"], capture_output=True, text=True
        )
        if done.returncode:
            table.add_row(name, "–", "–", done.stderr.strip().splitlines()[-1][:60])
            continue
        figures[name] = found = json.loads(done.stdout.splitlines()[-1])
        table.add_row(name, f"{found['seconds']:.3f}", f"{found['ratio']:.2f}", f"{found['extra_bytes'] / 2**20:,.0f}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
