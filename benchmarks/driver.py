"""What the driver does alone while every other rank waits: routing, planning and dealing out an iteration's samples.

    python -m benchmarks.driver --rollouts 1000 --rollouts 10000 --rollouts 100000 --tokens 8192 --fixed
    python -m benchmarks.driver --plan-only            # 10⁴ samples of log-normal lengths: how well they pack
    python -m benchmarks.driver --rollouts 1000 --tokens 2000 --fixed --experts 384   # with the experts of every token
    python -m benchmarks.driver --rollouts 256 --tokens 2000 --tokenizer FOLDER   # routing with real teacher prompts

The rollouts are made up; what is timed is the trainer's own code. Dealing is timed twice: every share cut out
and pickled, as for any number of receivers, and (`--ranks R`) sent to R − 1 other processes over gloo on loopback. The
teacher's prompt is the question and the sibling's tokens: its tokenization is not in these figures. With `--tokenizer`
routing alone is timed, with teacher prompts of this tokenizer: once where rank 0 tokenizes the demonstrations, and once
where the ranks that have them did it before.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from rich.console import Console
from rich.table import Table

from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.batching import plan_batch, share_of
from megatron_srpo.batching.source import without_cycle_collector
from megatron_srpo.core.records import Attempt, Group, Prompt, Reward, Rollout, Sample
from megatron_srpo.mcore.parcel import write_parcel

GROUP = 8  # rollouts a prompt
PROMPT_TOKENS = 300
CORRECT = 0.5  # share of rollouts
RANKS = 64  # data-parallel ranks that are planned for


@dataclass(frozen=True)
class TeacherIds:
    ids: array
    truncated: bool = False


def lengths_of(count: int, tokens: int, *, fixed: bool, seed: int = 0) -> np.ndarray:
    """Response lengths: all `tokens`, or log-normal (median tokens / 8, σ 0.8) cut at `tokens`."""
    if fixed:
        return np.full(count, tokens)
    drawn = np.random.default_rng(seed).lognormal(math.log(tokens / 8), 0.8, count)
    return np.clip(drawn, 1, tokens).astype(int)


def made_up(lengths: np.ndarray, seed: int = 0, experts: int = 0) -> list[Group]:
    """Scored groups of one iteration; every response has memory of its own, and `experts` bytes of experts per
    token."""
    rng = np.random.default_rng(seed)
    groups = [
        Group(Prompt(f"train:{i}", (), rng.integers(0, 150_000, PROMPT_TOKENS).tolist(), "", "exact"), [])
        for i in range(math.ceil(len(lengths) / GROUP))
    ]
    for i, length in enumerate(lengths.tolist()):
        ids, logprobs = array("i"), array("f")
        ids.frombytes(rng.integers(0, 150_000, length, dtype=np.int32).tobytes())
        logprobs.frombytes((-rng.random(length, dtype=np.float32)).tobytes())
        rollout, correct = (
            Rollout(i // GROUP, i % GROUP, ids, logprobs, str(i), "stop", 0),
            bool(rng.random() < CORRECT),
        )
        if experts:
            rollout.experts = np.full((PROMPT_TOKENS + length - 1, experts // 8, 8), i % 128, dtype=np.uint8)
        groups[i // GROUP].attempts.append(Attempt(rollout, Reward(float(correct)), correct))
    return groups


def routed(lengths: np.ndarray, experts: int = 0) -> tuple[Callable[[], list[list[Sample]]], int]:
    """(the call that routes, bytes of all tokens and log-probs)."""
    groups = made_up(lengths, experts=experts)
    ids = [attempt.rollout.token_ids for group in groups for attempt in group.attempts]

    def teacher_prompt(prompt: Prompt, solution: str, feedback: str | None, **_: object) -> TeacherIds:
        return TeacherIds(array("i", prompt.token_ids) + ids[int(solution)])

    def call() -> list[list[Sample]]:
        route(groups, algorithm(), seed=0, iteration=0, teacher_prompt=teacher_prompt)
        return [group.samples for group in groups]

    return call, int(lengths.sum()) * 8


def real_prompts(folder: str, count: int, tokens: int) -> dict[str, float]:
    """Seconds of routing with real teacher prompts. The responses are the project's own pages, cut at random places."""
    from megatron_srpo.config import DataConfig, TeacherConfig
    from megatron_srpo.data import Demonstrations, TeacherPromptBuilder, load_tokenizer

    tokenizer = load_tokenizer(folder)
    pages = "\n".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
    length = round(tokens * len(pages) / len(tokenizer.encode(pages)))  # letters of so many tokens
    rng, groups = np.random.default_rng(0), made_up(np.full(count, tokens))
    for group in groups:
        at = int(rng.integers(len(pages) - length))
        group.prompt = replace(group.prompt, messages=({"role": "user", "content": pages[at : at + 1_000]},))
        for attempt in group.attempts:
            at = int(rng.integers(len(pages) - length))
            attempt.rollout.text = pages[at : at + length]
    build = TeacherPromptBuilder(tokenizer, TeacherConfig(), DataConfig(train="unused"), limit=10 * tokens)

    def call() -> None:
        build._inserted.cache_clear()
        build.prepare([group.prompt for group in groups])
        route(groups, algorithm(), seed=0, iteration=0, teacher_prompt=build)

    with without_cycle_collector():
        seconds = {"rank 0 tokenizes": timed(call)[1]}
        demonstrations = Demonstrations(folder, {})
        for group in groups:
            for attempt in group.attempts:
                if attempt.correct:
                    demonstrations.begin(attempt.rollout.text)
                    (attempt.demonstration,) = demonstrations.take([attempt.rollout.text]).values()
        demonstrations.close()
        seconds["tokens are known"] = timed(call)[1]
    return seconds


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[Any, float]:
    """(result, seconds): of the CPU, so that neighbours do not matter; the driver's work is one thread's."""
    started = clock()
    result = call()
    return result, clock() - started


def budget(tokens: int) -> int:
    """A row that holds the longest teacher prompt and response."""
    return 2 * (PROMPT_TOKENS + tokens)


def driver_phases(count: int, tokens: int, *, fixed: bool, experts: int = 0) -> dict[str, float]:
    """Seconds and bytes of one iteration on the driver."""
    lengths = lengths_of(count, tokens, fixed=fixed)
    call, payload = routed(lengths, experts)
    made = peak_bytes()
    with without_cycle_collector():
        groups, route_seconds = timed(call)
        samples = [sample for group in groups for sample in group]
        plan, plan_seconds = timed(lambda: plan_batch(groups, dp_size=RANKS, max_tokens=budget(tokens)))
        deal_seconds, sent = 0.0, 0
        box = io.BytesIO()
        for rank in range(RANKS):  # one at a time, as Control.deal does
            part, seconds = timed(lambda rank=rank: write_parcel(box, share_of(samples, plan, rank)))
            deal_seconds, sent = deal_seconds + seconds, sent + len(part)
            del part
    return {
        "rollouts": count, "tokens": int(lengths.sum()), "route_s": route_seconds, "plan_s": plan_seconds,
        "deal_s": deal_seconds, "dealt_bytes": sent, "payload_bytes": payload, "before_bytes": made,
        "peak_bytes": peak_bytes(), "efficiency": plan.efficiency, "imbalance": plan.imbalance,
    }  # fmt: skip


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _sending_rank(rank: int, ranks: int, count: int, tokens: int, port: int, results: Any) -> None:
    from megatron_srpo.mcore.control import Control

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    topology = SimpleNamespace(
        rank=rank, world_size=ranks, is_driver=rank == 0, dp_rank=rank, control_group=dist.group.WORLD
    )
    control, kept = Control(topology), []
    if rank == 0:
        groups = routed(lengths_of(count, tokens, fixed=True))[0]()
        kept = [
            [sample for group in groups for sample in group],
            plan_batch(groups, dp_size=ranks, max_tokens=budget(tokens)),
        ]
    control.barrier()
    for part in (lambda dp_rank: None, lambda dp_rank: share_of(*kept, dp_rank)):  # the first learns who is where
        take = (lambda part=part: control.deal(part)) if rank == 0 else control.receive_share
        _, seconds = timed(take, time.perf_counter)
    control.barrier()
    if rank == 0:
        results.put(seconds)
    dist.destroy_process_group()


def sending(ranks: int, count: int, tokens: int, port: int) -> float:
    """Seconds of `Control.deal` from the driver to ranks − 1 processes over gloo on loopback."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_sending_rank, (ranks, count, tokens, port, results), ranks)
    return results.get()


def main(
    rollouts: Annotated[list[int] | None, typer.Option(help="of an iteration; may be repeated")] = None,
    tokens: Annotated[int, typer.Option(help="of the longest response")] = 8192,
    fixed: Annotated[bool, typer.Option("--fixed", help="every response has that many")] = False,
    experts: Annotated[int, typer.Option(help="bytes of experts per token, a multiple of 8")] = 0,
    ranks: Annotated[int, typer.Option(help="processes that samples are really dealt to; 0: none")] = 0,
    port: Annotated[int, typer.Option(help="for --ranks")] = 29731,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="packing quality on 10⁴ samples")] = False,
    tokenizer: Annotated[str, typer.Option(help="folder; times routing with real teacher prompts instead")] = "",
) -> None:
    """Print a line a size, and the lines as JSON."""
    console = Console(width=120)
    if tokenizer:
        for count in rollouts or [256]:
            found = real_prompts(tokenizer, count, tokens)
            parts = [f"{name}: {seconds:.2f} s" for name, seconds in found.items()]
            console.print(f"route, {count:,} responses of {tokens:,} tokens, {', '.join(parts)}")
        return
    counts = rollouts or ([10_000] if plan_only else [1_000, 10_000])
    lines = [in_process_of_its_own(count, tokens, fixed, experts) for count in counts]
    table = Table(title=f"driver, {RANKS} data-parallel ranks, responses of {'' if fixed else 'up to '}{tokens} tokens")
    columns = ("rollouts", "tokens", "route s", "plan s", "deal s", "deal GB", "peak GB", "efficiency", "imbalance")
    for name in columns:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            f"{line['rollouts']:,}", f"{line['tokens']:.3g}", f"{line['route_s']:.2f}", f"{line['plan_s']:.2f}",
            f"{line['deal_s']:.2f}", f"{line['dealt_bytes'] / 1e9:.2f}", f"{line['peak_bytes'] / 1e9:.2f}",
            f"{line['efficiency']:.4f}", f"{line['imbalance']:.4f}",
        )  # fmt: skip
    console.print(table)
    if ranks:
        seconds = sending(ranks, counts[0], tokens, port)
        console.print(f"{counts[0]:,} rollouts dealt to {ranks - 1} processes over gloo on loopback: {seconds:.2f} s")
    console.print_json(json.dumps(lines))


def in_process_of_its_own(count: int, tokens: int, fixed: bool, experts: int = 0) -> dict[str, float]:
    """So that a size's peak memory is its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(driver_phases, (count, tokens), {"fixed": fixed, "experts": experts})


if __name__ == "__main__":
    typer.run(main)
