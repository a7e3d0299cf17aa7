"""Rewards on the ranks that have the responses first, while other responses are still being generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_srpo.core.records import Prompt, Reward, Rollout
from megatron_srpo.rewards import RewardPool, RewardTask

Place = tuple[int, int]  # prompt, sample


class RewardScorer:
    """One rank's share of the scoring: what its engine hands over goes to its own pool, the driver gets the rewards.

    `pool` is None on a rank that no engine hands responses to; the driver has one. The numbers do not depend on where a
    response is scored. Every rank calls `start` and `finish`.
    """

    def __init__(self, pool: RewardPool | None, control: Any) -> None:
        self._pool, self._control = pool, control
        self._prompts: list[Prompt] = []
        self._places: dict[Place, None] = {}  # of what was added, in order
        self._error: Exception | None = None

    def start(self, prompts: list[Prompt]) -> Callable[[Rollout], None] | None:
        """Begin a batch; returns what an engine calls with each response that is complete."""
        self._prompts, self._places, self._error = prompts, {}, None
        return None if self._pool is None else self._add

    def _add(self, rollout: Rollout) -> None:
        place = rollout.prompt, rollout.sample
        if self._error is not None or place in self._places:
            return
        try:
            self._pool.add([self._task(rollout)])
            self._places[place] = None
        except Exception as error:  # inside an engine's loop it would leave the other ranks waiting: `finish` raises it
            self._error = error

    def finish(self, rollouts: list[Rollout] | None) -> list[Reward] | None:
        """The rewards of the driver's `rollouts`, in their order, on the driver (None elsewhere). What no rank has
        scored, the driver does. Raises on every rank when scoring failed on one."""
        scored: dict[Place, Reward] = {}
        try:
            if self._pool is not None and self._error is None:
                scored = dict(zip(self._places, self._pool.finish(), strict=True))
        except Exception as error:
            self._error = error
        parts = self._control.gather((scored, self._error))
        return self._control.on_driver(lambda: self._in_order(rollouts, parts))

    def _in_order(self, rollouts: list[Rollout], parts: list[tuple[dict[Place, Reward], Exception | None]]) -> list:
        for _, error in parts:
            if error is not None:
                raise error
        rewards = {place: reward for scored, _ in parts for place, reward in scored.items()}
        rest = [rollout for rollout in rollouts if (rollout.prompt, rollout.sample) not in rewards]
        for rollout, reward in zip(rest, self._pool.score([self._task(rollout) for rollout in rest]), strict=True):
            rewards[rollout.prompt, rollout.sample] = reward
        return [rewards[rollout.prompt, rollout.sample] for rollout in rollouts]

    def _task(self, rollout: Rollout) -> RewardTask:
        prompt = self._prompts[rollout.prompt]
        return RewardTask(prompt.kind, rollout.text, prompt.answer, prompt.metadata)
