"""What the self-teacher of an attempt is shown. Each source is one class; the first that has something teaches."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_srpo.algorithms.base import Distillation
from megatron_srpo.core.records import Attempt, Group, Prompt


class TeacherPromptLike(Protocol):
    """An enriched prompt: its token ids, and whether its demonstration had to be shortened."""

    @property
    def ids(self) -> array[int]: ...

    @property
    def truncated(self) -> bool: ...


# (prompt, text of a correct solution or None, feedback or None) → an enriched prompt, or None if none fits
TeacherPromptFunction = Callable[[Prompt, str | None, str | None], TeacherPromptLike | None]


@dataclass(frozen=True)
class Lesson:
    """What a teacher reads in addition to the question."""

    solution: str | None = None
    feedback: str | None = None
    sibling: int | None = None  # the sample whose answer is the solution


class TeacherSource(Protocol):
    """Something to show the teachers of one group's attempts."""

    def has_lesson(self, attempt: Attempt) -> bool:
        """Whether it has something for this attempt."""

    def lesson(self, attempt: Attempt) -> Lesson:
        """What it has; called only where `has_lesson`."""


class Siblings:
    """A correct attempt at the same prompt. An attempt never teaches itself.

    `choice`: which one, see Distillation.sibling. Ties are broken at random, from (seed, iteration, prompt, sample).
    """

    def __init__(self, group: Group, choice: str, seed: int, iteration: int) -> None:
        self._uid, self._choice, self._draw = group.prompt.uid, choice, (seed, iteration)
        self._correct = [attempt for attempt in group.attempts if attempt.correct]
        self._used: Counter[int] = Counter()  # how often each sample has taught

    def has_lesson(self, attempt: Attempt) -> bool:
        return any(other is not attempt for other in self._correct)

    def lesson(self, attempt: Attempt) -> Lesson:
        candidates = [other.rollout for other in self._correct if other is not attempt]
        if self._choice == "shortest":
            shortest = min(other.response_length for other in candidates)
            candidates = [other for other in candidates if other.response_length == shortest]
        elif self._choice == "least_used":
            fewest = min(self._used[other.sample] for other in candidates)
            candidates = [other for other in candidates if self._used[other.sample] == fewest]
        draw = stable_hash(*self._draw, self._uid, attempt.rollout.sample)
        chosen = candidates[draw % len(candidates)]
        return Lesson(solution=chosen.text, sibling=chosen.sample)

    def taught(self, sibling: int) -> None:
        """Count that this sample's answer is shown to a teacher."""
        self._used[sibling] += 1


class Feedback:
    """What the environment says of the attempt itself."""

    def has_lesson(self, attempt: Attempt) -> bool:
        return bool((attempt.reward.feedback or "").strip())

    def lesson(self, attempt: Attempt) -> Lesson:
        return Lesson(feedback=(attempt.reward.feedback or "").strip())


class GroupTeachers:
    """The teacher prompts of one group. `settings`: the algorithm's, None for one without a teacher."""

    def __init__(
        self, group: Group, settings: Distillation | None, build: TeacherPromptFunction, *,
        feedback_with_solution: bool, seed: int, iteration: int,
    ) -> None:  # fmt: skip
        self._prompt, self._build, self._both = group.prompt, build, feedback_with_solution
        self._siblings = Siblings(group, settings.sibling if settings else "random", seed, iteration)
        self._feedback = Feedback()
        self._sources: list[TeacherSource] = [self._siblings]
        if settings is not None and settings.use_feedback:
            self._sources.append(self._feedback)
        self._built: dict[tuple[str | None, str | None], TeacherPromptLike | None] = {}

    def can_teach(self, attempt: Attempt) -> bool:
        """m_i, unless no prompt fits."""
        return any(source.has_lesson(attempt) for source in self._sources)

    def prompt(self, attempt: Attempt) -> tuple[TeacherPromptLike | None, int | None]:
        """The enriched prompt, None if none fits, and the sample that teaches, None without one."""
        having = [source for source in self._sources if source.has_lesson(attempt)]
        lesson = having[0].lesson(attempt)
        if self._both and self._feedback in having:
            lesson = replace(lesson, feedback=self._feedback.lesson(attempt).feedback)
        shown = (lesson.solution, lesson.feedback)
        if shown not in self._built:  # attempts that are shown the same share one prompt
            self._built[shown] = self._build(self._prompt, *shown)
        prompt = self._built[shown]
        if prompt is not None and lesson.sibling is not None:
            self._siblings.taught(lesson.sibling)
        return prompt, lesson.sibling


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that depends on `parts` alone: the same in every process, on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
