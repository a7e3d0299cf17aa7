"""Rewards on the ranks that have the responses first, while other responses are still being generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from megatron_srpo.core.records import Attempt, Episode, Group, Prompt, Reward, Rollout
from megatron_srpo.rewards import RewardPool, RewardTask

Key = tuple[int, int]  # prompt, sample
Scored = tuple[dict[Key, Reward], Exception | None]  # what a rank has scored, or what failed there


class Gathering(Protocol):
    """The part of Control that scorers use."""

    def gather(self, mine: Scored) -> list[Scored]: ...

    def share(self, compute: Callable[[], None]) -> None: ...


class IdleScorer:
    """The scorer of a rank that no engine hands responses to."""

    def __init__(self, control: Gathering) -> None:
        self._control = control

    def start(self, prompts: list[Prompt]) -> None:
        """Begin a batch."""

    def finish(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """Nothing; raises when scoring failed on one of the ranks."""
        self._control.gather(({}, None))
        self._control.share(lambda: None)
        return []

    def same_answers(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[bool]:
        """Never called: rank 0 has a pool."""
        raise AssertionError("rank 0 compares answers, with its pool")


class PoolScorer:
    """The scorer of a rank whose engine hands responses over: its own pool scores them, rank 0 gets the rewards. An
    episode whose environment has given its reward keeps that.

    The numbers do not depend on where a response is scored. Every rank calls `start` and `finish`.
    """

    def __init__(self, pool: RewardPool, control: Gathering, *, threshold: float, leads: bool) -> None:
        self._pool, self._control, self._threshold, self._leads = pool, control, threshold, leads
        self._prompts: list[Prompt] = []
        self._added: dict[Key, None] = {}  # in order
        self._error: Exception | None = None

    def start(self, prompts: list[Prompt]) -> Callable[[Rollout], None]:
        """Begin a batch; returns what an engine calls with each response that is complete."""
        self._prompts, self._added, self._error = prompts, {}, None
        return self._add

    def _add(self, rollout: Rollout) -> None:
        key = rollout.prompt, rollout.sample
        if self._error is not None or key in self._added or _own_reward(rollout) is not None:
            return
        try:
            self._pool.add([self._task(rollout)])
            self._added[key] = None
        except Exception as error:  # inside an engine's loop it would leave the other ranks waiting: `finish` raises it
            self._error = error

    def finish(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """Rank 0: the groups of `rollouts`, by prompt and sample; it scores what no other rank has. Other ranks: [].
        Raises on every rank when scoring failed on one."""
        scored: dict[Key, Reward] = {}
        try:
            if self._error is None:
                scored = dict(zip(self._added, self._pool.finish(), strict=True))
        except Exception as error:
            self._error = error
        parts = self._control.gather((scored, self._error))
        groups = [Group(prompt, []) for prompt in self._prompts] if self._leads else []
        self._control.share(lambda: self._fill(groups, rollouts, parts))
        return groups

    def _fill(self, groups: list[Group], rollouts: Sequence[Rollout], parts: list[Scored]) -> None:
        for _, error in parts:
            if error is not None:
                raise error
        rewards = {key: reward for scored, _ in parts for key, reward in scored.items()}
        for rollout in rollouts:
            if (own := _own_reward(rollout)) is not None:
                rewards[rollout.prompt, rollout.sample] = own
        rest = [rollout for rollout in rollouts if (rollout.prompt, rollout.sample) not in rewards]
        for rollout, reward in zip(rest, self._pool.score([self._task(rollout) for rollout in rest]), strict=True):
            rewards[rollout.prompt, rollout.sample] = reward
        for rollout in sorted(rollouts, key=lambda rollout: rollout.sample):
            reward = rewards[rollout.prompt, rollout.sample]
            by_turn: tuple[str, ...] = ()
            if rollout.episode is not None:
                by_turn = _feedback_by_turn(rollout.episode, reward)
                if rollout.episode.reward is None:
                    reward = replace(reward, feedback=_joined(rollout.episode.feedback, reward.feedback))
            correct = reward.score >= self._threshold
            groups[rollout.prompt].attempts.append(Attempt(rollout, reward, correct, turn_feedback=by_turn))

    def same_answers(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[bool]:
        """Scores each response as if the other response's prediction were the right answer, where the kind can do that.
        What fails or takes too long is not the same."""
        numbers = [number for number, (prompt, _, _) in enumerate(pairs) if self._pool.can_compare(prompt.kind)]
        chosen = [pairs[number] for number in numbers]
        tasks = [RewardTask(prompt.kind, text, prediction, prompt.metadata) for prompt, text, prediction in chosen]
        found = [False] * len(pairs)
        for number, reward in zip(numbers, self._pool.score(tasks), strict=True):
            found[number] = reward.error is None and reward.score >= self._threshold
        return found

    def _task(self, rollout: Rollout) -> RewardTask:
        prompt = self._prompts[rollout.prompt]
        text = rollout.text if rollout.episode is None else rollout.episode.reply
        return RewardTask(prompt.kind, text, prompt.answer, prompt.metadata)


def _feedback_by_turn(episode: Episode, reward: Reward) -> tuple[str, ...]:
    """What was wrong in each turn. A reward function speaks of the last turn, and so does what belongs to no turn."""
    *before, last = episode.turn_feedback or ("",)
    if episode.reward is None or not any(episode.turn_feedback):
        last = _joined(last, reward.feedback) or ""
    return (*before, last)


def _joined(*texts: str | None) -> str | None:
    return "\n".join(filter(None, texts)) or None


def _own_reward(rollout: Rollout) -> Reward | None:
    """What its environment says."""
    return None if rollout.episode is None else rollout.episode.reward
