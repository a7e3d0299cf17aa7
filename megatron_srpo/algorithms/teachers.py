"""What the self-teacher of an attempt is shown. Each source is one class; the first that has something teaches."""

from __future__ import annotations

import hashlib
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_srpo.algorithms.base import SelfTeaching, SourceName
from megatron_srpo.core.records import Attempt, Context, Gap, Group, Prompt, Rollout, TurnFeedback


class TeacherPromptLike(Protocol):
    """An enriched prompt: its token ids, and whether its demonstration had to be shortened. `filled`: the tokens that
    replace each gap of TurnFeedback; asked for only where there are some."""

    @property
    def ids(self) -> array[int]: ...

    @property
    def filled(self) -> Sequence[array[int]]: ...

    @property
    def truncated(self) -> bool: ...


class TeacherPromptFunction(Protocol):
    """Makes enriched prompts. `turns` is given where feedback stands at its turn (teacher.feedback_at)."""

    def __call__(
        self, prompt: Prompt, solution: str | None, feedback: str | None, turns: TurnFeedback = ..., /, *,
        solution_ids: array[int] | None,
    ) -> TeacherPromptLike | None:  # fmt: skip
        """From the text of a correct solution and from feedback; None if none fits. `solution_ids`: the solution's
        tokens, where they are known."""


@dataclass(frozen=True)
class Lesson:
    """What a teacher reads in addition to the question."""

    solution: str | None = None
    feedback: str | None = None
    sibling: int | None = None  # the sample whose answer is the solution
    solution_ids: array[int] | None = None  # Attempt.demonstration of this sample
    turns: tuple[str, ...] = ()  # feedback on each turn, to be read right before it; that on the first is `feedback`


@dataclass(frozen=True)
class Shown:
    """A teacher's prompt: its tokens, shared by the attempts that are shown the same."""

    ids: array[int]
    truncated: bool
    sibling: int | None
    source: str = ""  # what it shows: a SourceName, or two of them
    filled: tuple[tuple[Gap, array[int]], ...] = ()  # gaps of the sequence, and the tokens that the teacher reads there


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
        candidates = [other for other in self._found if other is not attempt]
        if self._choice != "random":
            rank = self._rank([other.rollout for other in candidates])
            best = min(rank(other.rollout) for other in candidates)
            candidates = [other for other in candidates if rank(other.rollout) == best]
        draw = stable_hash(*self._draw, self._uid, attempt.rollout.sample)
        chosen = candidates[draw % len(candidates)]
        return Lesson(chosen.rollout.text, sibling=chosen.rollout.sample, solution_ids=chosen.demonstration)

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
    """What the environment says of the attempt itself; with `by_turn` of each of its turns."""

    def __init__(self, *, by_turn: bool) -> None:
        self._by_turn = by_turn

    def has_lesson(self, attempt: Attempt) -> bool:
        return any(self._texts(attempt))

    def lesson(self, attempt: Attempt) -> Lesson:
        texts = self._texts(attempt)
        return Lesson(feedback=texts[0] or None, turns=texts if len(texts) > 1 else ())

    def _texts(self, attempt: Attempt) -> tuple[str, ...]:
        by_turn = attempt.turn_feedback if self._by_turn else ()
        return tuple(text.strip() for text in by_turn or (attempt.reward.feedback or "",))


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


def can_teach_all_wrong(group: Group, settings: SelfTeaching) -> bool:
    """Whether a source can teach an attempt of a group without any correct one."""
    sources: dict[SourceName, TeacherSource] = {
        "solution": ReferenceSolution(group), "memory": SuccessMemory(group, 0), "feedback": Feedback(by_turn=False),
        "none": NoDemonstration(),
    }  # fmt: skip
    return any(
        name in settings.sources and source.has_lesson(attempt)
        for name, source in sources.items()
        for attempt in group.attempts
    )


class GroupTeachers:
    """The teacher prompts of one group. `settings`: the algorithm's."""

    def __init__(
        self, group: Group, settings: SelfTeaching, build: TeacherPromptFunction, *, feedback_with_solution: bool,
        feedback_at_turn: bool, seed: int,
    ) -> None:  # fmt: skip
        self._prompt, self._build, self._both = group.prompt, build, feedback_with_solution
        self._siblings, self._feedback = Siblings(group, settings, seed), Feedback(by_turn=feedback_at_turn)
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
        self._ids: dict[bytes, array[int]] = {}  # one array for equal prompts
        self._built: dict[tuple[str | None, str | None, bytes | None], TeacherPromptLike | None] = {}

    def can_teach(self, attempt: Attempt) -> bool:
        """m_i, unless no prompt fits."""
        if self._contrast is not None and not self._contrast.has_lesson(attempt):
            return False
        return any(source.has_lesson(attempt) for source in self._sources.values())

    def prompts(self, attempt: Attempt) -> list[Shown] | None:
        """The teacher's prompt for each sequence of an attempt that can be taught, None if one of them does not fit."""
        having = [name for name, source in self._sources.items() if source.has_lesson(attempt)]
        shows = having[:1]
        lesson = self._sources[having[0]].lesson(attempt)
        if self._both and "feedback" in having[1:]:
            found, shows = self._feedback.lesson(attempt), [*shows, "feedback"]
            lesson = replace(lesson, feedback=found.feedback, turns=found.turns)
        shown = self._in_sequences(lesson, attempt.rollout, " and ".join(shows))
        if shown is not None and lesson.sibling is not None:
            self._siblings.taught(lesson.sibling)
        return shown

    def contrasts_of(self, attempt: Attempt) -> list[Shown] | None:
        """As `prompts`, with a wrong answer shown."""
        assert self._contrast is not None, "only a method with Needs.contrast has it"
        return self._in_sequences(self._contrast.lesson(attempt), attempt.rollout)

    def _in_sequences(self, lesson: Lesson, rollout: Rollout, source: str = "") -> list[Shown] | None:
        found = []
        for part, (context, _, _) in enumerate(rollout.sequences):
            turns = _turn_feedback(lesson.turns, rollout, part)
            one = None if turns is None else self._shown(lesson, source, context, turns)
            if one is None:
                return None
            found.append(one)
        return found

    def _shown(self, lesson: Lesson, source: str, context: Context | None, turns: TurnFeedback) -> Shown | None:
        prompt = self._prompt
        if context is not None:
            prompt = replace(
                prompt, messages=context.messages, tools=context.tools, question=context.question,
                token_ids=list(context.token_ids),
            )  # fmt: skip
        at_turns = bool(turns.messages or turns.gaps)
        if lesson.solution is None and lesson.feedback is None and not at_turns:
            return Shown(self._shared(array("i", prompt.token_ids)), truncated=False, sibling=None, source=source)
        if at_turns:  # of this attempt alone
            built = self._build(prompt, lesson.solution, lesson.feedback, turns, solution_ids=lesson.solution_ids)
        else:
            key = (lesson.solution, lesson.feedback, None if context is None else context.token_ids.tobytes())
            if key not in self._built:
                ids = lesson.solution_ids
                self._built[key] = self._build(prompt, lesson.solution, lesson.feedback, solution_ids=ids)
            built = self._built[key]
        if built is None:
            return None
        gaps = [gap for gap, _ in turns.gaps]
        filled = tuple(zip(gaps, built.filled, strict=True)) if gaps else ()
        return Shown(self._shared(built.ids), built.truncated, lesson.sibling, source, filled)

    def _shared(self, ids: array[int]) -> array[int]:
        """The array of equal ids: samples that share it share its place in a packed row."""
        return self._ids.setdefault(ids.tobytes(), ids)


def _turn_feedback(texts: Sequence[str], rollout: Rollout, part: int) -> TurnFeedback | None:
    """Where one of the rollout's sequences has feedback on its turns behind the first; None if there is a turn before
    which nothing can be shown."""
    shown = {turn: text for turn, text in enumerate(texts) if turn and text}
    if not shown:
        return TurnFeedback()
    episode = rollout.episode
    assert episode is not None, "only episodes have turns"
    context, begin, end = rollout.sequences[part]
    given = 0 if context is None else len(context.messages)
    messages = {episode.answers[turn]: text for turn, text in shown.items() if episode.answers[turn] < given}
    gaps = [gap for gap in episode.gaps if begin <= gap.begin < end and gap.turn in shown]
    over = int(np.searchsorted(np.cumsum(episode.turns), np.count_nonzero(rollout.trained[:end]), side="right"))
    if len(messages) + len(gaps) < sum(turn < over for turn in shown):
        return None
    inside = [(replace(gap, begin=gap.begin - begin, end=gap.end - begin), shown[gap.turn]) for gap in gaps]
    return TurnFeedback(messages, tuple(inside))


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that depends on `parts` alone: the same in every process, on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
