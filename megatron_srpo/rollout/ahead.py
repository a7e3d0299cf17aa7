"""The next batches are generated while this one trains (rollout.max_staleness > 0).

iteration        k                  k+1                k+2
generate     k+1 ▒▒▒▒▒▒▒▒▒      k+2 ▒▒▒▒▒▒▒▒▒               one batch ahead: its samples are one publish old
train            ████████████       ████████████
publish                      ┆                  ┆

The driver's own; the other ranks use the engine as it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_srpo.core.records import Prompt, Rollout
from megatron_srpo.rollout.engine import GenerateRequest, OnRollout, SamplingSettings


@dataclass
class Batch:
    """Prompts whose responses are under way."""

    prompts: list[Prompt]
    requests: list[GenerateRequest]
    loader_state: dict[str, Any]  # before it was drawn: a resumed run draws it again
    answers: Future
    started: float  # seconds, monotonic
    done: float = 0.0


class Ahead:
    """Stands in for the prompt loader and for the engine (rollout.servers.ServersEngine).

    `batches`: how many are generated ahead. `requests`: (prompts, iteration, refill) → requests. Nothing is begun for
    iterations from `total` on.
    """

    def __init__(
        self, engine: Any, loader: Any, requests: Callable[[list[Prompt], int, int], list[GenerateRequest]],
        sampling: SamplingSettings, *, batches: int, start: int, total: int,
    ) -> None:  # fmt: skip
        self._engine, self._loader, self._requests, self._sampling = engine, loader, requests, sampling
        self._ahead, self._next, self._total = batches, start, total
        self._batches: deque[Batch] = deque()
        self._metrics: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    # ---- the loader ----

    @property
    def epoch(self) -> int:
        return self._loader.epoch

    def next_batch(self) -> list[Prompt]:
        if not self._batches:
            self._begin()
        return self._batches[0].prompts

    def state_dict(self) -> dict[str, Any]:
        """Where a run goes on that has trained on nothing of what is under way."""
        return self._batches[0].loader_state if self._batches else self._loader.state_dict()

    # ---- the engine ----

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout] | None:
        """The answers to the batch that `next_batch` gave, after the next ones have been begun; anything else (an
        evaluation) is passed on."""
        if not self._batches or self._batches[0].requests != requests:
            return self._engine.generate(requests, sampling, on_rollout)
        while self._next < self._total and len(self._batches) <= self._ahead:
            self._begin()
        batch = self._batches.popleft()
        asked = time.monotonic()
        rollouts = self._engine.collect(batch.answers)
        taken = max(batch.done - batch.started, 1e-9)
        waited = time.monotonic() - asked
        self._metrics = {
            "rollout/generation_seconds": taken,
            "rollout/overlap_fraction": max(0.0, 1.0 - waited / taken),  # of its time in which we did something else
        }
        return rollouts

    def metrics(self) -> dict[str, float]:
        return self._engine.metrics() | self._metrics

    def _begin(self) -> None:
        state = self._loader.state_dict()
        prompts = self._loader.next_batch()
        requests = self._requests(prompts, self._next, 0)
        # Rewards are made when the batch is wanted: an evaluation may come in between.
        answers = self._engine.submit(requests, self._sampling)
        batch = Batch(prompts, requests, state, answers, time.monotonic())
        answers.add_done_callback(lambda _: setattr(batch, "done", time.monotonic()))
        self._batches.append(batch)
        self._next += 1
