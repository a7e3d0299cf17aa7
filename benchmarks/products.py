"""What a train step and a scoring pass cost beside their bare matrix products.

    python -m benchmarks.products [--hidden 512] [--layers 8] [--vocabulary 5120] [--case 64:64] [--profile]

The products are those of all linear layers with all tokens of each row, and of the LM head with the trained ones: one
each for a scoring pass, three each for a train step (output, gradient of the input, gradient of the weight). They run
on the model's own weights into memory that exists already, in turns with the trainer's own passes. "With attention"
adds torch's causal attention of each whole sequence, forward or both ways. A train step contains the optimizer. Times
are CPU-seconds of one thread, so that neighbours matter less. With --profile torch's profiler tells where a train
step's time goes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.shared_prompts import made_up
from benchmarks.step import machine
from benchmarks.teacher_swap import _policy
from megatron_srpo.batching import plan_batch, share_of
from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.config import Config
from megatron_srpo.core.records import Batch, BatchPlan, Sample
from megatron_srpo.losses.objective import Objective
from megatron_srpo.mcore import groups
from megatron_srpo.mcore.device import choose_device
from megatron_srpo.mcore.policy import Policy
from megatron_srpo.run.cli import run_alone

CASES = ("64:64", "32:256")


def linear_weights(policy: Policy) -> Iterator[Tensor]:
    """The weights of the layers' products [out, in]."""
    for name, parameter in policy.shards.parameters.items():
        if ".layers." in name and parameter.dim() == 2:
            yield parameter.data


def head_of(policy: Policy) -> Tensor:
    """The head's weight [V, H]."""
    return policy.shards.parameters["output_layer.weight"].data


class Products:
    """The bare products of one batch. Inputs and outputs are made once, for each number of tokens, and inputs are never
    written: what grows or fades from product to product would soon be numbers that take longer."""

    def __init__(self, policy: Policy, rows: list[tuple[int, int]], *, backward: bool) -> None:
        """rows: (all tokens, trained tokens) of each."""
        self._work: list[tuple[Tensor, ...]] = []
        memory: dict[tuple[int, int, bool], Tensor] = {}
        self._backward = backward

        def of(height: int, width: int, *, written: bool) -> Tensor:
            return memory.setdefault((height, width, written), torch.randn(height, width))

        for tokens, trained in rows:
            head = head_of(policy)
            for weight in [*linear_weights(policy), head]:
                count, (outputs, inputs) = trained if weight is head else tokens, weight.shape
                self._work.append((
                    weight, of(count, inputs, written=False), of(count, outputs, written=False),
                    of(count, outputs, written=True), of(count, inputs, written=True),
                    of(outputs, inputs, written=True),
                ))  # fmt: skip

    def __call__(self) -> None:
        for weight, given, gradient, output, input_gradient, weight_gradient in self._work:
            torch.mm(given, weight.T, out=output)
            if self._backward:
                torch.mm(gradient, weight, out=input_gradient)
                torch.mm(gradient.T, given, out=weight_gradient)


class Attention:
    """torch's causal attention of whole sequences in every layer, on tensors of the right shapes."""

    def __init__(self, policy: Policy, sequences: int, length: int, *, backward: bool) -> None:
        config = policy.runner.config
        self._layers, self._backward = config.num_layers, backward
        shape = (sequences, config.num_attention_heads, length, config.kv_channels)
        self._given = [torch.randn(shape, requires_grad=backward) for _ in range(3)]

    def __call__(self) -> None:
        for _ in range(self._layers):
            mixed = F.scaled_dot_product_attention(*self._given, is_causal=True)
            if self._backward:
                torch.autograd.grad(mixed, self._given, mixed.detach())


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU-seconds of this process."""
    started = time.process_time()
    call()
    return time.process_time() - started


def main(
    hidden: int = 512,
    layers: int = 8,
    vocabulary: int = 5120,
    prompts: int = 8,
    samples: int = 8,
    tokens: Annotated[int, typer.Option(help="Most tokens of a row.")] = 4096,
    repeats: int = 5,
    shared: Annotated[bool, typer.Option(help="Samples share their prompt.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="PROMPT:RESPONSE, may be repeated.")] = None,
    profile: bool = False,
) -> None:
    run_alone()
    config = Config(
        model={"path": "unused", "dtype": "float32"}, data={"train": "unused"}, algorithm={"name": "grpo"},
        train={"share_prompts": shared}, optimizer={"lr": 1e-6},
    )  # fmt: skip
    path = choose_device("cpu", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=5)
    policy = _policy(config, topology, path, hidden=hidden, layers=layers, vocabulary=vocabulary, dtype="float32")
    table = Table("prompt : response", "work", "products, CPU s", "ours ÷ products", "ours ÷ products with attention")
    for name in case or CASES:
        prompt, response = map(int, name.split(":"))
        routed = made_up(config, prompts, samples, prompt, response, vocabulary)
        plan = plan_batch(routed, dp_size=1, max_tokens=tokens, padding=policy.padding, drop_zero_gradient=True)
        mine, share = share_of([sample for group in routed for sample in group], plan, 0)
        for work, found in measured(config, policy, mine, share, prompt + response, repeats).items():
            ours, bare, attention = (statistics.median(one) for one in zip(*found, strict=True))
            cells = f"{bare:.3f}", f"{ours / bare:.2f}", f"{ours / (bare + attention):.2f}"
            table.add_row(name, work, *cells)
            Console().print(f"{name} {work}: {', '.join(cells)}")
        if profile:
            profiled(config, policy, mine, share)
    count = sum(p.numel() for p in policy.shards.parameters.values()) / 1e6
    Console().print(f"{machine()}; {count:.1f} M, {prompts} prompts × {samples} responses, rows of {tokens} tokens")
    Console(width=140).print(table)


def measured(
    config: Config, policy: Policy, mine: list[Sample], share: BatchPlan, length: int, repeats: int
) -> dict[str, list[tuple[float, float, float]]]:
    """CPU-seconds of ours, of the bare products, and of bare attention, for each kind of work, in turns."""
    objective = Objective(config)
    passes = BatchPasses(Batch(mine, share, {}), policy, objective)
    (mini,) = share.mini_batches
    (rows,) = mini.student
    sizes = [(row.tokens, sum(mine[i].length for i in row.samples)) for row in rows]
    ways = {
        "scoring": lambda: passes.run(objective.check_pass()),
        "train step": lambda: passes.train_step(mini),
    }
    found: dict[str, list[tuple[float, float, float]]] = {}
    for work, ours in ways.items():
        backward = work == "train step"
        count = sum(len(row.samples) for row in rows)
        others = Products(policy, sizes, backward=backward), Attention(policy, count, length, backward=backward)
        results = [tuple(map(cpu_seconds, (ours, *others))) for _ in range(repeats + 1)]
        found[work] = results[1:]
    return found


def profiled(config: Config, policy: Policy, mine: list[Sample], share: BatchPlan) -> None:
    """Print torch's profile of a train step."""
    passes = BatchPasses(Batch(mine, share, {}), policy, Objective(config))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        passes.train_step(share.mini_batches[0])
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
