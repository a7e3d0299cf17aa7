"""What sharing prompts saves: tokens and CPU-seconds of one optimizer step, shared and unshared in turns.

    python -m benchmarks.shared_prompts [--hidden 256] [--layers 8] [--algorithm srpo]
    python -m benchmarks.shared_prompts --case 250:16 --samples 16
    torchrun --nproc-per-node 2 -m benchmarks.shared_prompts --context 2      # or: --experts 8

A case is PROMPT:RESPONSE in tokens. The model is a random Qwen3 of that size, the samples are made up, half of them
correct, and routed by the algorithm; what is timed is the trainer's own scoring passes and train step on one rank. The
two forms run alternately, and the table has the median of each and their ratio. Under torchrun the sequences are spread
over the ranks (--context), or the samples and the experts (--experts), and CPU-seconds are those of all ranks.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from array import array
from types import SimpleNamespace
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.step import machine
from benchmarks.teacher_swap import _policy
from megatron_srpo.algorithms.routing import route
from megatron_srpo.batching import plan_batch, share_of
from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.config import Config
from megatron_srpo.core.records import Attempt, Batch, BatchPlan, Group, Prompt, Reward, Rollout, Sample
from megatron_srpo.losses.objective import Objective
from megatron_srpo.mcore import groups
from megatron_srpo.mcore.device import choose_device
from megatron_srpo.mcore.policy import Policy
from megatron_srpo.run.cli import run_alone

CASES = ("240:16", "64:64", "32:256")  # 15:1, 1:1, 1:8
HINT = 24  # tokens of the words around a teacher's demonstration


def made_up(
    config: Config, prompts: int, samples: int, prompt: int, response: int, vocabulary: int
) -> list[list[Sample]]:
    rng = np.random.default_rng(0)

    def ids(count: int) -> array[int]:
        return array("i", rng.integers(1, vocabulary, count).tolist())

    made = []
    for number in range(prompts):
        group = Group(Prompt(f"train:{number}", (), list(ids(prompt)), "", "exact"), [])
        for sample in range(samples):
            logprobs = array("f", [-np.log(vocabulary)] * response)
            rollout = Rollout(number, sample, ids(response), logprobs, f"{number} {sample}", "stop", 0)
            group.attempts.append(Attempt(rollout, Reward(float(sample % 2)), sample % 2 == 1))
        made.append(group)

    def teacher_prompt(asked: Prompt, solution: str, feedback: str | None, **_: object) -> SimpleNamespace:
        number, sample = map(int, solution.split())
        shown = made[number].attempts[sample].rollout.token_ids
        return SimpleNamespace(ids=array("i", asked.token_ids) + shown + array("i", [1] * HINT), truncated=False)

    route(made, config.algorithm, seed=0, iteration=1, teacher_prompt=teacher_prompt)
    return [group.samples for group in made]


def timed_step(config: Config, policy: Policy, mine: list[Sample], share: BatchPlan) -> tuple[int, float]:
    """Tokens and CPU-seconds of all ranks of the scoring passes and the optimizer steps of one batch."""
    objective = Objective(config)
    passes, started = BatchPasses(Batch(mine, share, {}), policy, objective), time.process_time()
    for scoring in objective.passes():
        passes.run(scoring)
    for mini in share.mini_batches:
        passes.train_step(mini)
    spent = torch.tensor(time.process_time() - started)
    dist.all_reduce(spent)
    return sum(count for key, count in passes.forwarded.items() if key.endswith("_tokens")), float(spent)


def main(
    hidden: int = 256,
    layers: int = 8,
    vocabulary: int = 2048,
    algorithm: str = "srpo",
    prompts: int = 8,
    samples: int = 8,
    repeats: int = 3,
    case: Annotated[list[str] | None, typer.Option(help="PROMPT:RESPONSE, may be repeated.")] = None,
    context: Annotated[int, typer.Option(help="Context-parallel ranks.")] = 1,
    experts: Annotated[int, typer.Option(help="Experts of the model, spread over all ranks. 0: a dense model.")] = 0,
) -> None:
    run_alone()
    ranks = int(os.environ["WORLD_SIZE"])
    config = Config(
        model={"path": "unused", "dtype": "float32"}, data={"train": "unused"},
        parallel={"context_parallel_size": context, "expert_model_parallel_size": ranks if experts else 1},
        algorithm={"name": algorithm, "sibling": "shortest"} if algorithm != "grpo" else {"name": algorithm},
    )  # fmt: skip
    path = choose_device("cpu", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=5)
    sizes = {"hidden": hidden, "layers": layers, "vocabulary": vocabulary, "experts": experts}
    policy = _policy(config, topology, path, **sizes, dtype="float32")
    table = Table(
        "prompt : response", "samples", "unshared tokens", "shared", "ratio", "unshared CPU s", "shared", "ratio"
    )
    for name in case or CASES:
        prompt, response = map(int, name.split(":"))
        routed = made_up(config, prompts, samples, prompt, response, vocabulary)
        flat = [sample for group in routed for sample in group]
        found: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
        for _ in range(repeats + 1):
            for shares in (False, True):
                policy.padding = dataclasses.replace(policy.padding, shares=shares)
                plan = plan_batch(
                    routed, dp_size=topology.dp_size, max_tokens=4096, padding=policy.padding, drop_zero_gradient=True
                )
                mine, share = share_of(flat, plan, topology.dp_rank)
                found[shares].append(timed_step(config, policy, mine, share))
        tokens = {shares: runs[0][0] for shares, runs in found.items()}
        seconds = {shares: statistics.median(spent for _, spent in runs[1:]) for shares, runs in found.items()}
        table.add_row(
            name, str(samples), f"{tokens[False]:,}", f"{tokens[True]:,}", f"{tokens[True] / tokens[False]:.2f}",
            f"{seconds[False]:.2f}", f"{seconds[True]:.2f}", f"{seconds[True] / seconds[False]:.2f}",
        )  # fmt: skip
        if topology.is_driver:
            Console().print(f"{name}: {seconds[True] / seconds[False]:.2f} of the CPU-seconds")
    if not topology.is_driver:
        return
    Console().print(
        f"{machine()}; {algorithm}, {sum(p.numel() for p in policy.shards.parameters.values()) / 1e6:.1f} M"
    )
    Console(width=140).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
