"""Answers prompts in rounds, for partial rollouts (rollout/partial.py). Rank 0 says in each round which responses go on
from which tokens, and all ranks generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import cast

from megatron_srpo.core.protocols import RoleControl, Scorer, Timer
from megatron_srpo.core.records import Group, Prompt, Rollout
from megatron_srpo.rollout import GenerateRequest, Part, PartialPool, RolloutEngine, SamplingSettings


class _Rounds:
    """What both roles do in the rounds of an iteration. `tokens`: how many a response gets at most in one round."""

    def __init__(
        self, engine: RolloutEngine, scorer: Scorer, control: RoleControl, sampling: SamplingSettings, tokens: int
    ) -> None:  # fmt: skip
        self._engine, self._scorer, self._control = engine, scorer, control
        self._sampling, self._longest = replace(sampling, max_tokens=tokens), sampling.max_tokens

    def _begin(self, prompts: list[Prompt]) -> Callable[[list[Part]], list[Rollout]]:
        """Begin an iteration. Returns what answers a round: the parts' next tokens on rank 0, [] on the other ranks.
        Complete responses are scored meanwhile."""
        score = self._scorer.start(prompts)
        calls = count()

        def add(rollout: Rollout) -> None:
            if score is not None and rollout.finish_reason != "part":
                score(rollout)

        def answer(parts: list[Part]) -> list[Rollout]:
            sampling = replace(self._sampling, goes_on=next(calls) > 0)
            return self._engine.generate([self._request(part, prompts) for part in parts], sampling, add)

        return answer

    def _request(self, part: Part, prompts: list[Prompt]) -> GenerateRequest:
        tokens, left = self._sampling.max_tokens, self._longest - len(part.begun)
        return GenerateRequest(
            part.prompt, part.sample, prompts[part.prompt].token_ids, part.seed,
            max_tokens=min(left, tokens), begun=part.begun, cut=left > tokens,
        )  # fmt: skip


class PartialGenerator(_Rounds):
    """Rank 0's Generator."""

    def __init__(
        self, engine: RolloutEngine, scorer: Scorer, control: RoleControl, sampling: SamplingSettings, tokens: int,
        pool: PartialPool,
    ) -> None:  # fmt: skip
        super().__init__(engine, scorer, control, sampling, tokens)
        self._pool = pool

    def __call__(self, prompts: list[Prompt], iteration: int, refill: int, timer: Timer) -> list[Group]:
        """The groups to train; `prompts` are those of all groups under way."""
        rollouts: list[Rollout] = []
        with timer.phase("gen"):
            answer = self._begin(prompts)
            while parts := self._control.share(partial(self._pool.next_round, rollouts)):
                rollouts = answer(parts)
        with timer.phase("reward"):
            return self._pool.take(self._scorer.finish(self._pool.complete))


class PartialFollower(_Rounds):
    """The other ranks' Generator."""

    def __call__(self, prompts: list[Prompt], iteration: int, refill: int, timer: Timer) -> list[Group]:
        """[]; rank 0 has the groups."""
        with timer.phase("gen"):
            answer = self._begin(prompts)
            while parts := cast("list[Part]", self._control.receive()):
                answer(parts)
        with timer.phase("reward"):
            return self._scorer.finish([])
