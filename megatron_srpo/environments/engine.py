"""An engine whose `generate` runs episodes, wherever a request has a row to talk about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from megatron_srpo.core.records import Rollout
from megatron_srpo.environments.episodes import BatchFeed, EpisodeRunner
from megatron_srpo.rollout import Feed, GenerateRequest, OnRollout, RolloutEngine, SamplingSettings

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

        def begin(mine: list[GenerateRequest]) -> Feed:
            assert self._runner is not None, "this rank's engine is handed requests"
            feeds.append(self._runner.feed(mine, sampling, on_rollout))
            return feeds[0]

        error: Exception | None = None
        try:
            self._engine.converse(requests, sampling, begin)
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
        if self._runner is not None:
            self._runner.close()
        self._engine.close()


def _raise_first(parts: list[Gathered]) -> None:
    for _, error in parts:
        if error is not None:
            raise error
