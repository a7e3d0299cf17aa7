"""An engine whose `generate` runs episodes, wherever a request has a row to talk about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, cast

import torch

from megatron_srpo.core.records import Rollout
from megatron_srpo.environments.episodes import BatchFeed, EpisodeRunner
from megatron_srpo.rollout import Feed, GenerateRequest, OnRollout, RolloutEngine, SamplingSettings

if TYPE_CHECKING:
    from megatron_srpo.rollout.prefetcher import AsyncEngine

Gathered = tuple[list[Rollout], Exception | None]


class Gathering(Protocol):
    """The part of Control that it uses."""

    def gather(self, mine: Gathered) -> list[Gathered]: ...

    def share(self, compute: Callable[[], None]) -> None: ...


class EpisodeEngine:
    """A RolloutEngine around another. `runner` is that of a rank whose engine is handed requests, None on the others.

    The wrapped engine's own requests, those without a row, are answered by it as before.
    """

    def __init__(self, engine: RolloutEngine, runner: EpisodeRunner | None, control: Gathering) -> None:
        self._engine, self._runner, self._control = engine, runner, control
        self._ahead: dict[Future[list[Rollout]], list[BatchFeed]] = {}  # of batches that are not collected yet

    @property
    def weight_version(self) -> int:
        """Of the last publish."""
        return self._engine.weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._engine.weight_version = version

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout]:
        """See RolloutEngine: one Rollout for each episode."""
        if all(request.row is None for request in requests):
            return self._engine.generate(requests, sampling, on_rollout)
        feeds: list[BatchFeed] = []
        begin = self._begin(feeds, sampling, on_rollout)
        return self._gathered(feeds, lambda: self._engine.converse(requests, sampling, begin))

    def submit(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> Future[list[Rollout]]:
        """See AsyncEngine: rank 0, with servers."""
        engine = cast("AsyncEngine", self._engine)
        if all(request.row is None for request in requests):
            return engine.submit(requests, sampling, on_rollout)
        feeds: list[BatchFeed] = []
        answers = engine.submit_feed(requests, sampling, self._begin(feeds, sampling, on_rollout))
        self._ahead[answers] = feeds
        return answers

    def collect(self, answers: Future[list[Rollout]]) -> list[Rollout]:
        """See AsyncEngine. The other ranks are in `generate`."""
        engine = cast("AsyncEngine", self._engine)
        if answers not in self._ahead:
            return engine.collect(answers)
        return self._gathered(self._ahead.pop(answers), lambda: engine.collect(answers))

    def _begin(
        self, feeds: list[BatchFeed], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> Callable[[list[GenerateRequest]], Feed]:
        """What begins the episodes of an engine, and notes their feed in `feeds`."""

        def begin(mine: list[GenerateRequest]) -> Feed:
            assert self._runner is not None, "this rank's engine is handed requests"
            feeds.append(self._runner.feed(mine, sampling, on_rollout))
            return feeds[0]

        return begin

    def _gathered(self, feeds: list[BatchFeed], converse: Callable[[], object]) -> list[Rollout]:
        """The episodes of all engines on rank 0, when `converse` has come to its end on every rank."""
        error: Exception | None = None
        try:
            converse()
        except Exception as failure:  # the other ranks wait in the gather and must learn of the error there
            error = failure
        finally:
            for feed in feeds:
                feed.close()
        parts = self._control.gather(([rollout for feed in feeds for rollout in feed.rollouts], error))
        self._control.share(lambda: _raise_first(parts))
        found = [rollout for rollouts, _ in parts for rollout in rollouts]
        return sorted(found, key=lambda rollout: (rollout.prompt, rollout.sample))

    def converse(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> None:  # fmt: skip
        self._engine.converse(requests, sampling, begin)

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.publish(weights, version)

    def metrics(self) -> dict[str, float]:
        return self._engine.metrics()

    def sleep(self, *, publish_next: bool = False) -> None:
        self._engine.sleep(publish_next=publish_next)

    def close(self) -> None:
        """End the environments, then the engine."""
        for feed in (feed for feeds in self._ahead.values() for feed in feeds):
            feed.stop()
        if self._runner is not None:
            self._runner.close()
        self._engine.close()


def _raise_first(parts: list[Gathered]) -> None:
    for _, error in parts:
        if error is not None:
            raise error
