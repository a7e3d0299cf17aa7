"""Partial rollouts against iterations that complete every response: engine steps, CPU seconds, ages of responses.

    python -m benchmarks.partial [--size 1M] [--prompts 8] [--samples 8] [--mean 100] [--longest 448] [--iterations 16]
    python -m benchmarks.partial --no-engine --prompts 32 --mean 2000 --longest 8192 --iterations 60

Lengths of responses are log-normal (of the logarithm: --sigma) and belong to their seeds, so that both ways generate
the same responses. A decoding step of a GPU reads all weights, whatever it generates; there the steps decide. "again"
are the tokens, of prompts and of responses so far, that engines compute anew in an iteration because of the new
weights, beyond the prompts that it starts, for each trained token. The first quarter of the iterations, while the pool
fills, is not counted. --no-engine counts steps of one engine with room for all responses, and generates nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

PROMPT = 32  # tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1M", choices=("1M", "30M"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--mean", type=int, default=100, help="tokens of a response")
    parser.add_argument("--longest", type=int, default=448, help="tokens of the longest response")
    parser.add_argument("--sigma", type=float, default=0.8)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--staleness", type=int, default=8, help="rollout.max_staleness")
    parser.add_argument("--no-engine", action="store_true")
    return parser.parse_args()


class DrawnLengths:
    """An engine whose responses have the lengths that belong to their seeds. It counts what it is asked."""

    def __init__(self, engine: Any, lengths: Sequence[int]) -> None:
        self._engine, self._lengths, self.weight_version = engine, lengths, 0
        self.counts: Counter[str] = Counter()

    def generate(self, requests: Sequence[Any], sampling: Any, on_rollout: Any = None) -> list[Any]:
        asked = []
        for request in requests:
            left = random.Random(request.seed).choice(self._lengths) - len(request.begun)
            tokens = min(left, request.longest(sampling))
            asked.append(replace(request, max_tokens=tokens, cut=left > tokens))
            if request.begun and not sampling.goes_on:
                self.counts["again"] += request.length
        self._engine.weight_version = self.weight_version
        return self._engine.generate(asked, replace(sampling, ignore_eos=True), on_rollout)


class NoEngine:
    """Answers at once; `steps` are those of an engine with room for all requests."""

    def __init__(self) -> None:
        self.weight_version = self.steps = 0

    def generate(self, requests: Sequence[Any], sampling: Any, on_rollout: Any = None) -> list[Any]:
        from megatron_srpo.core.records import Rollout

        self.steps += max(request.max_tokens for request in requests)
        return [
            Rollout(
                request.prompt, request.sample, [5] * request.max_tokens, [-1.0] * request.max_tokens, "",
                "part" if request.cut else "length", self.weight_version,
            )
            for request in requests
        ]  # fmt: skip


@contextmanager
def real_engine(options: argparse.Namespace) -> Iterator[Any]:
    """One colocated engine with a random model, which has `steps`."""
    from benchmarks.weight_sync import make_model
    from examples.tiny.tokenizer import character_tokenizer
    from megatron_srpo.config import RolloutConfig
    from megatron_srpo.rollout import ColocatedEngine, prepare_environment

    prepare_environment("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(options.size, "float32", Path(scratch) / "model")
        character_tokenizer("0123456789", "").save_pretrained(folder)
        engine: Any = ColocatedEngine(
            hf_dir=str(folder), dtype="float32", max_model_len=PROMPT + options.longest, seed=0,
            rollout=RolloutConfig(cpu_kv_cache_gib=1, max_num_seqs=256, enforce_eager=True),
        )  # fmt: skip
        vllm, engine.steps = engine._llm.llm_engine, 0
        step = vllm.step

        def counted() -> Any:
            engine.steps += 1
            return step()

        vllm.step = counted
        try:
            yield engine
        finally:
            engine.close()


class Scorer:
    """Every response is worth nothing."""

    def start(self, prompts: list[Any], *, taught: bool = True) -> None:
        self._prompts = prompts

    def finish(self, rollouts: Sequence[Any]) -> list[Any]:
        from megatron_srpo.core.records import Attempt, Group, Reward

        groups = [Group(prompt, []) for prompt in self._prompts]
        for rollout in rollouts:
            groups[rollout.prompt].attempts.append(Attempt(rollout, Reward(0.0), correct=False))
        return groups


def measure(options: argparse.Namespace, engine: Any, tokens: int, extra: int) -> dict[str, float]:
    """What the counted iterations took and trained. `tokens`: rollout.partial_tokens; `extra`: partial_groups."""
    from benchmarks.rollout import cpu_seconds
    from megatron_srpo.config import RolloutConfig
    from megatron_srpo.core.records import Prompt
    from megatron_srpo.data import PromptLoader
    from megatron_srpo.plan.workload import log_normal_lengths
    from megatron_srpo.rollout import PartialPool, SamplingSettings
    from megatron_srpo.run.generation import GroupGenerator, Requests
    from megatron_srpo.run.partial import PartialGenerator

    draw = random.Random(0)
    rows = [
        Prompt(f"train:{i}", (), [draw.randrange(5, 60) for _ in range(PROMPT)], "", "exact")
        for i in range(options.prompts * (options.iterations + 8))
    ]
    drawn = DrawnLengths(engine, log_normal_lengths(options.mean, options.longest, options.sigma))
    requests, sampling = Requests(0, options.samples), SamplingSettings(max_tokens=options.longest)
    control: Any = SimpleNamespace(share=lambda compute: compute())
    timer: Any = SimpleNamespace(phase=lambda name: nullcontext())
    loader: Any = PromptLoader(rows, 1 if tokens else options.prompts)
    generate: Any = GroupGenerator(drawn, Scorer(), requests, sampling)
    if tokens:
        rollout = RolloutConfig(
            rollout_batch_size=options.prompts, partial_tokens=tokens, partial_groups=extra,
            max_staleness=options.staleness, max_response_length=options.longest,
        )  # fmt: skip

        def seeds(prompt: Prompt, iteration: int) -> list[int]:
            return [request.seed for request in requests([prompt], iteration, 0)]

        loader = PartialPool(loader, seeds, rollout, total=10**9)
        generate = PartialGenerator(drawn, Scorer(), control, sampling, tokens, loader)
    found: Counter[str] = Counter()
    oldest = 0
    for iteration in range(options.iterations):
        drawn.weight_version = iteration
        drawn.counts.clear()
        steps, used = engine.steps, cpu_seconds()
        groups = generate(loader.next_batch(), iteration, 0, timer)
        if iteration < options.iterations // 4:
            continue
        trained = [attempt.rollout for group in groups for attempt in group.attempts]
        ages = [iteration - rollout.weight_version for rollout in trained]
        oldest = max(oldest, *ages)
        found.update(
            iterations=1, steps=engine.steps - steps, cpu=cpu_seconds() - used, again=drawn.counts["again"],
            tokens=sum(len(rollout.token_ids) for rollout in trained), age=sum(ages), responses=len(ages),
        )  # fmt: skip
    return {
        "steps an iteration": found["steps"] / found["iterations"],
        "steps a 1,000 tokens": 1000 * found["steps"] / found["tokens"],
        "CPU s a 1,000 tokens": 1000 * found["cpu"] / found["tokens"],
        "again": found["again"] / found["tokens"],
        "mean age": found["age"] / found["responses"],
        "oldest": oldest,
    }


def main() -> None:
    options = arguments()
    longest, batch = options.longest, options.prompts
    parts = (16, 8, 4) if options.no_engine else (8,)
    ways = [(0, 0), *((longest // part, batch // share) for share in (4, 2, 1) for part in parts)]
    print("partial_tokens partial_groups  steps/iteration  steps/1000  CPU s/1000  again  mean age  oldest")
    base: dict[str, float] = {}
    with nullcontext(NoEngine()) if options.no_engine else real_engine(options) as engine:
        for tokens, extra in ways:
            row = measure(options, engine, tokens, extra)
            base = base or row
            share = row["steps a 1,000 tokens"] / base["steps a 1,000 tokens"]
            cpu = row["CPU s a 1,000 tokens"] / base["CPU s a 1,000 tokens"]
            print(
                f"{tokens:14} {extra:14} {row['steps an iteration']:16.0f} {row['steps a 1,000 tokens']:11.2f} "
                f"{row['CPU s a 1,000 tokens']:11.3f} {row['again']:6.2f} {row['mean age']:9.2f} {row['oldest']:7.0f}"
                f"   RESULT steps {share:.2f}" + ("" if options.no_engine else f", CPU {cpu:.2f}"),
                flush=True,
            )


if __name__ == "__main__":
    main()
