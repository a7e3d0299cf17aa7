"""Generates the next batches while this one trains (rollout.max_staleness > 0).

iteration        k                  k+1                k+2
generate     k+1 ▒▒▒▒▒▒▒▒▒      k+2 ▒▒▒▒▒▒▒▒▒               one batch ahead: its samples are one publish old
train            ████████████       ████████████
publish                      ┆                  ┆

It is used on rank 0 only. The other ranks use the engine itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_srpo.core.records import Prompt, Rollout
from megatron_srpo.rollout.engine import Feed, GenerateRequest, OnRollout, SamplingSettings


class AsyncEngine(Protocol):
    """An engine that generates in the background."""

    def submit(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> Future[list[Rollout]]:
        """Begin to generate."""
        ...

    def submit_feed(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> Future[list[Rollout]]:  # fmt: skip
        """Begin to converse; see RolloutEngine."""
        ...

    def collect(self, answers: Future[list[Rollout]]) -> list[Rollout]:
        """Wait for what `submit` or `submit_feed` began."""
        ...

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout]: ...

    def metrics(self) -> dict[str, float]: ...


class PromptLoader(Protocol):
    """Draws batches of prompts; `state_dict` says where it continues."""

    @property
    def epoch(self) -> int: ...

    def next_batch(self) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass
class Batch:
    """Prompts whose responses are being generated."""

    prompts: list[Prompt]
    requests: list[GenerateRequest]
    loader_state: dict[str, Any]  # from before the batch was drawn: a resumed run draws it again
    epoch: int  # of the loader after the draw
    answers: Future[list[Rollout]]
    started: float  # seconds, monotonic
    done: float = 0.0


class Prefetcher:
    """Replaces the prompt loader and the engine, both of which it wraps.

    `batches` is the number of batches that are generated ahead. `requests` is (prompts, iteration, refill) → requests.
    No batch is begun for iteration `total` or a later one. `on_rollout` is called, in another thread, with each
    response that comes early.
    """

    def __init__(
        self, engine: AsyncEngine, loader: PromptLoader,
        requests: Callable[[list[Prompt], int, int], list[GenerateRequest]], sampling: SamplingSettings, *,
        batches: int, start: int, total: int, on_rollout: OnRollout | None = None,
    ) -> None:  # fmt: skip
        self._engine, self._loader, self._requests, self._sampling = engine, loader, requests, sampling
        self._depth, self._next, self._total, self._on_rollout = batches, start, total, on_rollout
        self._batches: deque[Batch] = deque()
        self._metrics: dict[str, float] = {}
        self._epoch: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    # ---- the loader ----

    @property
    def epoch(self) -> int:
        """Of the last batch that was generated: the loader is ahead of it."""
        return self._loader.epoch if self._epoch is None else self._epoch

    def next_batch(self) -> list[Prompt]:
        if not self._batches:
            self._begin()
        return self._batches[0].prompts

    def state_dict(self) -> dict[str, Any]:
        """The state from which a resumed run draws the batches again that are being generated now."""
        return self._batches[0].loader_state if self._batches else self._loader.state_dict()

    # ---- the engine ----

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout]:
        """Begin the next batches, then return the answers to the batch that `next_batch` gave. Other requests, such as
        those of an evaluation, go to the engine."""
        if not self._batches or self._batches[0].requests != requests:
            return self._engine.generate(requests, sampling, on_rollout)
        while self._next < self._total and len(self._batches) <= self._depth:
            self._begin()
        batch = self._batches.popleft()
        self._epoch = batch.epoch
        asked = time.monotonic()
        rollouts = self._engine.collect(batch.answers)
        taken = max(batch.done - batch.started, 1e-9)
        waited = time.monotonic() - asked
        self._metrics = {
            "rollout/generation_seconds": taken,
            "rollout/overlap_fraction": max(
                0.0, 1.0 - waited / taken
            ),  # the share of its time in which rank 0 did other work
        }
        return rollouts

    def metrics(self) -> dict[str, float]:
        return self._engine.metrics() | self._metrics

    def _begin(self) -> None:
        state = self._loader.state_dict()
        prompts = self._loader.next_batch()
        requests = self._requests(prompts, self._next, 0)
        # Rewards are computed when the batch is collected, because an evaluation may come in between.
        answers = self._engine.submit(requests, self._sampling, self._on_rollout)
        batch = Batch(prompts, requests, state, self._loader.epoch, answers, time.monotonic())
        answers.add_done_callback(lambda _: setattr(batch, "done", time.monotonic()))
        self._batches.append(batch)
        self._next += 1
