"""Held-out evaluation: avg@k, pass@k and maj@k of k sampled answers to each prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress

from megatron_srpo.algorithms.teachers import TeacherPromptFunction
from megatron_srpo.config.schema import EvalConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Attempt, Group, Prompt

Pair = tuple[Prompt, str, str]  # a prompt, a response to it, and the prediction of another response
SameAnswers = Callable[[Sequence[Pair]], list[bool]]


def accuracy_metrics(groups: Sequence[Group], *, k: int, same: SameAnswers | None = None) -> dict[str, float]:
    """Means over prompts, for all of them and, if there are several kinds, for each kind. accuracy and avg@k: share of
    correct answers; score: mean reward; pass@k: any answer is correct; maj@k: the answer that occurs most often is
    correct; ties go to the first.

    For maj@k all correct answers are one answer. Wrong ones are compared by the reward's prediction, or by the whole
    response if it has none; `same` says which of those that differ as text are the same answer.
    """
    majorities = _majorities(groups, same)
    found = _accuracies(groups, majorities, k, "eval")
    kinds = sorted({group.prompt.kind for group in groups})
    for kind in kinds if len(kinds) > 1 else []:
        of_kind = [group.prompt.kind == kind for group in groups]
        found |= _accuracies(
            list(compress(groups, of_kind)), list(compress(majorities, of_kind)), k, f"eval/{kind}"
        )  # fmt: skip
    return found


def _accuracies(groups: Sequence[Group], majorities: Sequence[bool], k: int, prefix: str) -> dict[str, float]:
    n = max(1, len(groups))
    attempts = [attempt for group in groups for attempt in group.attempts]
    episodes = [a.rollout.episode for a in attempts if a.rollout.episode is not None]
    of_episodes = (
        {
            f"{prefix}/turns": sum(len(episode.turns) for episode in episodes) / len(episodes),
            f"{prefix}/tool_errors": sum(episode.tool_errors for episode in episodes) / len(episodes),
        }
        if episodes
        else {}
    )
    average = sum(sum(a.correct for a in group.attempts) / len(group.attempts) for group in groups)
    score = sum(sum(group.scores) / len(group.attempts) for group in groups)
    return {
        f"{prefix}/accuracy": average / n,
        f"{prefix}/score": score / n,
        f"{prefix}/avg@{k}": average / n,
        f"{prefix}/pass@{k}": sum(any(a.correct for a in group.attempts) for group in groups) / n,
        f"{prefix}/maj@{k}": sum(majorities) / n,
        f"{prefix}/prompts": len(groups),
        f"{prefix}/response_length": sum(a.rollout.response_length for a in attempts) / max(1, len(attempts)),
        f"{prefix}/truncated": sum(a.rollout.finish_reason == "length" for a in attempts) / max(1, len(attempts)),
        f"{prefix}/errors": sum(a.reward.error is not None for a in attempts),
        **of_episodes,
    }


def chosen_prompts(prompts: Sequence[Prompt], settings: EvalConfig, split: str) -> tuple[list[Prompt], str]:
    """The prompts that are evaluated, and a line for the user that says which they are."""
    chosen = list(prompts[: settings.max_prompts] if settings.max_prompts else prompts)
    if len(chosen) == len(prompts):
        return chosen, f"evaluation: all {len(prompts)} {split} prompts"
    text = f"evaluation: the first {len(chosen)} of {len(prompts)} {split} prompts (eval.max_prompts)"
    kinds = Counter(prompt.kind for prompt in chosen)
    missing = sorted({prompt.kind for prompt in prompts} - kinds.keys())
    if len(kinds) + len(missing) > 1:
        text += ": " + ", ".join(f"{count} of kind {kind}" for kind, count in kinds.items())
        text += f"; none of kind {', '.join(missing)}" if missing else ""
    return chosen, text


def taught_prompts(
    prompts: Sequence[Prompt], build: TeacherPromptFunction, decode: Callable[[list[int]], str], split: str
) -> tuple[list[Prompt], list[str]]:  # fmt: skip
    """The prompts as the self-teacher reads them when it is shown the data's own solution, those without one left out;
    and lines for the user. `decode` gives the text of a prompt. UserError if none is left."""
    found, cut = [], 0
    for prompt in prompts:
        shown = build(prompt, prompt.solution, None, solution_ids=None) if prompt.solution.strip() else None
        if shown is not None:
            ids, cut = shown.ids.tolist(), cut + shown.truncated
            found.append(replace(prompt, token_ids=ids, messages=({"role": "user", "content": decode(ids)},)))
    if not found:
        raise UserError(
            f"eval --as-teacher: none of {len(prompts)} {split} prompts has a solution that fits: set "
            "data.solution_key to the field of the rows that has a worked solution, or raise teacher.max_prompt_length"
        )
    text = f"the model reads the solutions of {len(found)} {split} prompts, as the self-teacher does"
    lines = [text if len(found) == len(prompts) else f"{text}; {len(prompts) - len(found)} have none, or none fits"]
    if cut:
        lines.append(
            f"warning: {cut} of {len(found)} solutions are cut to fit, so the model does not read them whole; raise "
            "teacher.max_prompt_length"
        )
    return found, lines


def _majorities(groups: Sequence[Group], same: SameAnswers | None) -> list[bool]:
    """For each group whether its most frequent answer is correct."""
    answers = [_by_text(group.attempts) for group in groups]
    if same is not None:
        undecided = [(group, found) for group, found in zip(groups, answers, strict=True) if _undecided(found)]
        pairs = [(group.prompt, *pair) for group, found in undecided for pair in _pairs(found)]
        results = iter(same(pairs) if pairs else [])
        for _, found in undecided:
            _merge(found, [next(results) for _ in _pairs(found)])
    return [_largest(found)[0].correct for found in answers]


def _by_text(attempts: Sequence[Attempt]) -> list[list[Attempt]]:
    """The attempts by answer, in the order in which the answers occur."""
    found: dict[str | None, list[Attempt]] = {}
    for attempt in attempts:
        text = attempt.rollout.text.strip() if attempt.reward.prediction is None else attempt.reward.prediction
        found.setdefault(None if attempt.correct else text, []).append(attempt)
    return list(found.values())


def _largest(answers: Sequence[list[Attempt]]) -> list[Attempt]:
    return max(answers, key=len)  # the first of several


def _undecided(answers: Sequence[list[Attempt]]) -> bool:
    """Whether the correct answer has the majority now, and could lose it if wrong answers are the same."""
    right = sum(len(found) for found in answers if found[0].correct)
    wrong = sum(len(found) for found in answers if not found[0].correct)
    return _largest(answers)[0].correct and wrong >= right


def _comparable(answers: Sequence[list[Attempt]]) -> list[list[Attempt]]:
    return [found for found in answers if not found[0].correct and found[0].reward.prediction is not None]


def _pairs(answers: Sequence[list[Attempt]]) -> list[tuple[str, str]]:
    """Every later wrong answer's response with every earlier one's prediction."""
    wrong = _comparable(answers)
    return [
        (later[0].rollout.text, earlier[0].reward.prediction or "")
        for i, later in enumerate(wrong)
        for earlier in wrong[:i]
    ]


def _merge(answers: list[list[Attempt]], same: Sequence[bool]) -> None:
    """Join each wrong answer to the first earlier one that is the same; `same` is by `_pairs`."""
    wrong, results = _comparable(answers), iter(same)
    joined: list[list[Attempt]] = []  # by number of the wrong answer: the answer that it belongs to
    for i, later in enumerate(wrong):
        equal = [joined[j] for j in range(i) if next(results)]
        joined.append(equal[0] if equal else later)
        if equal:
            equal[0].extend(later)
            answers[:] = [found for found in answers if found is not later]
