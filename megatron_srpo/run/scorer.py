"""Rewards on the ranks that have the responses first, while other responses are still being generated."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_srpo.core.records import Attempt, Episode, Group, Prompt, Reward, Rollout
from megatron_srpo.data import Demonstrations
from megatron_srpo.rewards import RewardPool, RewardTask

Key = tuple[int, int]  # prompt, sample


@dataclass
class Scored:
    """What a rank knows of responses before rank 0 does, or what failed there."""

    rewards: dict[Key, Reward]
    demonstrations: dict[Key, array[int]]  # Attempt.demonstration
    error: Exception | None = None


class Gathering(Protocol):
    """The part of Control that scorers use."""

    def gather(self, mine: Scored) -> list[Scored]: ...

    def share(self, compute: Callable[[], None]) -> None: ...


class IdleScorer:
    """The scorer of a rank that no engine hands responses to."""

    def __init__(self, control: Gathering) -> None:
        self._control = control

    def start(self, prompts: list[Prompt], *, taught: bool = True) -> None:
        """Begin a batch."""

    def read(self, rollout: Rollout) -> None:
        """Never called: responses that come early come to rank 0."""

    def finish(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """Nothing; raises when scoring failed on one of the ranks."""
        self._control.gather(Scored({}, {}))
        self._control.share(lambda: None)
        return []

    def same_answers(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[bool]:
        """Never called: rank 0 has a pool."""
        raise AssertionError("rank 0 compares answers, with its pool")


class PoolScorer:
    """The scorer of a rank whose engine hands responses over: its own pool scores them, rank 0 gets the rewards. An
    episode whose environment has given its reward keeps that.

    The numbers do not depend on where a response is scored. Every rank calls `start` and `finish`. `opening`: what the
    chat template has written of every response.
    """

    def __init__(
        self, pool: RewardPool, control: Gathering, *, threshold: float, leads: bool, opening: str = ""
    ) -> None:  # fmt: skip
        self._opening = opening
        self._pool, self._control, self._threshold, self._leads = pool, control, threshold, leads
        self._demonstrations: Demonstrations | None = None
        self._wrong_too = False
        self._prompts: list[Prompt] = []
        self._added: dict[Key, None] = {}  # to the pool, in order
        self._texts: dict[Key, str] = {}  # of responses that teachers may be shown
        self._taught = True
        self._error: Exception | None = None

    def tokenize(self, demonstrations: Demonstrations, *, wrong: bool) -> None:
        """Have `demonstrations` tokenize what teachers may be shown, `wrong` responses too, while others are being
        generated. Without it rank 0 does, when it routes."""
        self._demonstrations, self._wrong_too = demonstrations, wrong

    def start(self, prompts: list[Prompt], *, taught: bool = True) -> Callable[[Rollout], None]:
        """Begin a batch; returns what an engine calls with each response that is complete."""
        self._prompts, self._added, self._texts, self._taught, self._error = prompts, {}, {}, taught, None
        return self._add

    def read(self, rollout: Rollout) -> None:
        """See Scorer."""
        if self._demonstrations is not None:
            self._demonstrations.begin(rollout.text)

    def _add(self, rollout: Rollout) -> None:
        key = rollout.prompt, rollout.sample
        if self._error is not None or key in self._added:
            return
        own = _own_reward(rollout)
        try:
            if own is None:
                self._pool.add([self._task(rollout)])
                self._added[key] = None
            if self._taught and (own is None or self._shown(own)):
                self.read(rollout)
                self._texts[key] = rollout.text
        except Exception as error:  # inside an engine's loop it would leave the other ranks waiting: `finish` raises it
            self._error = error

    def finish(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """Rank 0: the groups of `rollouts`, by prompt and sample; it scores what no other rank has. Other ranks: [].
        Raises on every rank when scoring failed on one."""
        scored = Scored({}, {})
        try:
            if self._error is None:
                scored.rewards = dict(zip(self._added, self._pool.finish(), strict=True))
                if not self._leads:
                    scored.demonstrations = self._read(self._texts, scored.rewards)
        except Exception as error:
            self._error = error
        scored.error = self._error
        parts = self._control.gather(scored)
        groups = [Group(prompt, []) for prompt in self._prompts] if self._leads else []
        self._control.share(lambda: self._fill(groups, rollouts, parts))
        return groups

    def _shown(self, reward: Reward) -> bool:
        """Whether a teacher may be shown a response with this reward."""
        return self._wrong_too or reward.score >= self._threshold

    def _read(self, texts: Mapping[Key, str], rewards: Mapping[Key, Reward]) -> dict[Key, array[int]]:
        """The tokens of those of the texts that were read and that teachers may be shown."""
        if self._demonstrations is None:
            return {}
        found = self._demonstrations.take(texts.values())
        return {
            key: found[text]
            for key, text in texts.items()
            if text in found and (key not in rewards or self._shown(rewards[key]))
        }

    def _fill(self, groups: list[Group], rollouts: Sequence[Rollout], parts: list[Scored]) -> None:
        for part in parts:
            if part.error is not None:
                raise part.error
        rewards = {key: reward for part in parts for key, reward in part.rewards.items()}
        for rollout in rollouts:
            if (own := _own_reward(rollout)) is not None:
                rewards[rollout.prompt, rollout.sample] = own
        rest = [rollout for rollout in rollouts if (rollout.prompt, rollout.sample) not in rewards]
        for rollout, reward in zip(rest, self._pool.score([self._task(rollout) for rollout in rest]), strict=True):
            rewards[rollout.prompt, rollout.sample] = reward
        demonstrations = self._read({(rollout.prompt, rollout.sample): rollout.text for rollout in rollouts}, rewards)
        for part in parts:
            demonstrations |= part.demonstrations
        for rollout in sorted(rollouts, key=lambda rollout: rollout.sample):
            key = rollout.prompt, rollout.sample
            reward = rewards[key]
            by_turn: tuple[str, ...] = ()
            if rollout.episode is not None:
                by_turn = _feedback_by_turn(rollout.episode, reward)
                if rollout.episode.reward is None:
                    reward = replace(reward, feedback=_joined(rollout.episode.feedback, reward.feedback))
            attempt = Attempt(rollout, reward, reward.score >= self._threshold, turn_feedback=by_turn)
            attempt.demonstration = demonstrations.get(key)
            groups[rollout.prompt].attempts.append(attempt)

    def same_answers(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[bool]:
        """Scores each response as if the other response's prediction were the right answer, where the kind can do that.
        What fails or takes too long is not the same."""
        numbers = [number for number, (prompt, _, _) in enumerate(pairs) if self._pool.can_compare(prompt.kind)]
        chosen = [pairs[number] for number in numbers]
        tasks = [
            RewardTask(prompt.kind, self._opening + text, prediction, prompt.metadata)
            for prompt, text, prediction in chosen
        ]
        found = [False] * len(pairs)
        for number, reward in zip(numbers, self._pool.score(tasks), strict=True):
            found[number] = reward.error is None and reward.score >= self._threshold
        return found

    def _task(self, rollout: Rollout) -> RewardTask:
        prompt = self._prompts[rollout.prompt]
        text = self._opening + rollout.text if rollout.episode is None else rollout.episode.reply
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
