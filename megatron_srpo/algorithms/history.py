"""What earlier iterations saw of each prompt: faded counts of solved and failed attempts, and correct responses.

The numbers are DRIFT's (arXiv 2606.30345). Only an algorithm with Needs.history keeps one; it is in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_srpo.core.protocols import State
from megatron_srpo.core.records import Group, History

FADE = 0.85  # of a count, for each iteration
ANSWERS = 4  # correct responses kept of a prompt, without duplicates
PROMPTS = 50_000  # prompts whose responses are kept; the one that was seen longest ago makes room


class Histories(Protocol):
    """The histories of all prompts, on rank 0."""

    def give(self, groups: Sequence[Group], iteration: int) -> None:
        """Set the history of every group."""

    def observe(self, groups: Sequence[Group], iteration: int) -> None:
        """Add what became of this iteration's attempts."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class NoHistories:
    """For an algorithm that does not need them."""

    def give(self, groups: Sequence[Group], iteration: int) -> None: ...

    def observe(self, groups: Sequence[Group], iteration: int) -> None: ...

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None: ...


@dataclass(frozen=True)
class _Entry:
    iteration: int  # when the prompt was last seen
    history: History


class PromptHistories:
    """See Histories."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}  # by uid, the one seen longest ago first

    def give(self, groups: Sequence[Group], iteration: int) -> None:
        for group in groups:
            group.history = self._now(group.prompt.uid, iteration)

    def _now(self, uid: str, iteration: int) -> History:
        entry = self._entries.get(uid)
        if entry is None:
            return History()
        fade, seen = FADE ** (iteration - entry.iteration), entry.history
        return replace(seen, solved=fade * seen.solved, failed=fade * seen.failed)

    def observe(self, groups: Sequence[Group], iteration: int) -> None:
        for group in groups:
            uid, correct = group.prompt.uid, [attempt.correct for attempt in group.attempts]
            before = self._now(uid, iteration)
            texts = [attempt.rollout.text for attempt in group.attempts if attempt.correct]
            answers = tuple(dict.fromkeys([*before.answers, *texts]))[-ANSWERS:]
            solved, failed = before.solved + sum(correct), before.failed + len(correct) - sum(correct)
            self._entries.pop(uid, None)
            self._entries[uid] = _Entry(iteration, History(solved, failed, answers))
        while len(self._entries) > PROMPTS:
            del self._entries[next(iter(self._entries))]

    def state_dict(self) -> State:
        """By uid: [iteration, solved, failed, answers]."""
        return {
            uid: [entry.iteration, entry.history.solved, entry.history.failed, list(entry.history.answers)]
            for uid, entry in self._entries.items()
        }

    def load_state_dict(self, state: State) -> None:
        self._entries = {}
        for uid, kept in state.items():
            assert isinstance(kept, list)
            iteration, solved, failed, answers = kept
            self._entries[uid] = _Entry(iteration, History(solved, failed, tuple(answers)))
