"""What the self-teacher of an attempt is shown. Each source is one class; the first that has something teaches."""

from __future__ import annotations

import hashlib
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_srpo.algorithms.base import SelfTeaching, SourceName
from megatron_srpo.core.records import Attempt, Context, Group, Prompt, Rollout


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


@dataclass(frozen=True)
class Shown:
    """A teacher's prompt: its tokens, shared by the attempts that are shown the same."""

    ids: array[int]
    truncated: bool
    sibling: int | None
    source: str = ""  # what it shows: a SourceName, or two of them
    lesson: Lesson = Lesson()


class TeacherSource(Protocol):
    """Something to show the teachers of one group's attempts."""

    def has_lesson(self, attempt: Attempt) -> bool:
        """Whether it has something for this attempt."""

    def lesson(self, attempt: Attempt) -> Lesson:
        """What it has; called only where `has_lesson`."""


class Siblings:
    """A correct attempt at the same prompt, or with `correct` = False a wrong one. An attempt never teaches itself.

    Which one: see SelfTeaching.sibling. Ties are broken at random, from (seed, iteration, prompt, sample).
    """

    def __init__(self, group: Group, settings: SelfTeaching, seed: int, *, correct: bool = True) -> None:
        self._uid, self._choice, self._draw = group.prompt.uid, settings.sibling, (seed, group.iteration)
        found = [attempt for attempt in group.attempts if attempt.correct is correct]
        if correct and settings.sibling_min_length and found:
            median = statistics.median(attempt.rollout.response_length for attempt in found)
            shortest = settings.sibling_min_length * median
            found = [attempt for attempt in found if attempt.rollout.response_length >= shortest]
        self._found = found
        self._used: Counter[int] = Counter()  # how often each sample has taught

    def has_lesson(self, attempt: Attempt) -> bool:
        return any(other is not attempt for other in self._found)

    def lesson(self, attempt: Attempt) -> Lesson:
        candidates = [other.rollout for other in self._found if other is not attempt]
        if self._choice != "random":
            rank = self._rank(candidates)
            best = min(map(rank, candidates))
            candidates = [other for other in candidates if rank(other) == best]
        draw = stable_hash(*self._draw, self._uid, attempt.rollout.sample)
        chosen = candidates[draw % len(candidates)]
        return Lesson(solution=chosen.text, sibling=chosen.sample)

    def _rank(self, candidates: Sequence[Rollout]) -> Callable[[Rollout], float]:
        """What the chosen sibling has least of."""
        if self._choice == "least_used":
            return lambda other: self._used[other.sample]
        if self._choice == "median":
            middle = statistics.median_low(other.response_length for other in candidates)
            return lambda other: abs(other.response_length - middle)
        sign = 1 if self._choice == "shortest" else -1
        return lambda other: sign * other.response_length

    def taught(self, sibling: int) -> None:
        """Count that this sample's answer is shown to a teacher."""
        self._used[sibling] += 1


class Feedback:
    """What the environment says of the attempt itself."""

    def has_lesson(self, attempt: Attempt) -> bool:
        return bool((attempt.reward.feedback or "").strip())

    def lesson(self, attempt: Attempt) -> Lesson:
        return Lesson(feedback=(attempt.reward.feedback or "").strip())


class ReferenceSolution:
    """The data's own solution (OPSD, arXiv 2601.18734): also for a prompt that nobody has solved."""

    def __init__(self, group: Group) -> None:
        self._solution = group.prompt.solution

    def has_lesson(self, attempt: Attempt) -> bool:
        return bool(self._solution.strip())

    def lesson(self, attempt: Attempt) -> Lesson:
        return Lesson(solution=self._solution)


class SuccessMemory:
    """A correct response of an earlier iteration (DRIFT, arXiv 2606.30345), drawn as Siblings draws."""

    def __init__(self, group: Group, seed: int) -> None:
        self._answers, self._draw = group.history.answers, (seed, group.iteration, group.prompt.uid)

    def has_lesson(self, attempt: Attempt) -> bool:
        return bool(self._answers)

    def lesson(self, attempt: Attempt) -> Lesson:
        draw = stable_hash(*self._draw, attempt.rollout.sample)
        return Lesson(solution=self._answers[draw % len(self._answers)])


class NoDemonstration:
    """The control: a teacher that reads the question alone (arXiv 2609.20612)."""

    def has_lesson(self, attempt: Attempt) -> bool:
        return True

    def lesson(self, attempt: Attempt) -> Lesson:
        return Lesson()


class GroupTeachers:
    """The teacher prompts of one group. `settings`: the algorithm's."""

    def __init__(
        self, group: Group, settings: SelfTeaching, build: TeacherPromptFunction, *, feedback_with_solution: bool,
        seed: int,
    ) -> None:  # fmt: skip
        self._prompt, self._build, self._both = group.prompt, build, feedback_with_solution
        self._siblings, self._feedback = Siblings(group, settings, seed), Feedback()
        known: dict[SourceName, TeacherSource] = {
            "sibling": self._siblings,
            "solution": ReferenceSolution(group),
            "memory": SuccessMemory(group, seed),
            "feedback": self._feedback,
            "none": NoDemonstration(),
        }
        self._sources = {name: known[name] for name in settings.sources}
        self._contrast = Siblings(group, settings, seed, correct=False) if settings.needs.contrast else None
        self.contrasts = self._contrast is not None  # the method also shows a wrong answer
        self._plain: dict[bytes | None, array[int]] = {}  # prompts without a demonstration
        self._built: dict[tuple[str | None, str | None, bytes | None], TeacherPromptLike | None] = {}

    def can_teach(self, attempt: Attempt) -> bool:
        """m_i, unless no prompt fits."""
        if self._contrast is not None and not self._contrast.has_lesson(attempt):
            return False
        return any(source.has_lesson(attempt) for source in self._sources.values())

    def prompt(self, attempt: Attempt) -> Shown | None:
        """The teacher's prompt, None if none fits."""
        having = [name for name, source in self._sources.items() if source.has_lesson(attempt)]
        shows = having[:1]
        lesson = self._sources[having[0]].lesson(attempt)
        if self._both and "feedback" in having[1:]:
            lesson, shows = replace(lesson, feedback=self._feedback.lesson(attempt).feedback), [*shows, "feedback"]
        shown = self._shown(lesson, " and ".join(shows))
        if shown is not None and lesson.sibling is not None:
            self._siblings.taught(lesson.sibling)
        return shown

    def contrast(self, attempt: Attempt) -> Shown | None:
        """The prompt that shows a wrong answer, None if none fits; for an attempt that can be taught."""
        assert self._contrast is not None, "only a method with Needs.contrast has it"
        return self._shown(self._contrast.lesson(attempt))

    def shown_in(self, shown: Shown, rollout: Rollout) -> list[Shown] | None:
        """The same lesson for each sequence of an attempt, None if it does not fit into one of them."""
        found = []
        for context, _, _ in rollout.sequences:
            one = shown if context is None else self._shown(shown.lesson, shown.source, context)
            if one is None:
                return None
            found.append(one)
        return found

    def _shown(self, lesson: Lesson, source: str = "", context: Context | None = None) -> Shown | None:
        prompt = self._prompt
        if context is not None:
            prompt = replace(
                prompt, messages=context.messages, tools=context.tools, question=context.question,
                token_ids=list(context.token_ids),
            )  # fmt: skip
        key = (lesson.solution, lesson.feedback, None if context is None else context.token_ids.tobytes())
        if lesson == Lesson():
            ids = self._plain.setdefault(key[2], array("i", prompt.token_ids))
            return Shown(ids, truncated=False, sibling=None, source=source)
        if key not in self._built:
            self._built[key] = self._build(prompt, lesson.solution, lesson.feedback)
        built = self._built[key]
        return None if built is None else Shown(built.ids, built.truncated, lesson.sibling, source, lesson)


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that depends on `parts` alone: the same in every process, on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
