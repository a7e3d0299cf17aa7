"""Groups → credit → samples. Everything behind routing executes the weights that it wrote into the samples."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_srpo.algorithms.base import Algorithm, SelfTeaching
from megatron_srpo.algorithms.report import RoutingReport
from megatron_srpo.algorithms.teachers import GroupTeachers, Shown, TeacherPromptFunction
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Attempt, Credit, Group, PerToken, Rollout, Sample, Stream, weighs

Taught = dict[int, list[Shown]]  # index of an attempt → its teacher's prompt, and with Needs.contrast the second one


def route(
    groups: Sequence[Group], algorithm: Algorithm, *, seed: int, iteration: int, teacher_prompt: TeacherPromptFunction,
    feedback_with_solution: bool = False,
) -> RoutingReport:  # fmt: skip
    """Give every group its samples, one for each attempt in order, and report what was done.

    Groups may have any size. `teacher_prompt` is called for attempts that are taught, and for no others; an attempt for
    which it returns None gets the credit of one that cannot be taught. Raises UserError for a reward that is not a
    finite number.
    """
    assert groups, "at least one group"
    report = RoutingReport()
    settings = algorithm.teaching or SelfTeaching(name="")  # teachable is also logged for methods without a teacher
    for group in groups:
        _require_finite(group)
        group.iteration = iteration
        teachers = GroupTeachers(
            group, settings, teacher_prompt, feedback_with_solution=feedback_with_solution, seed=seed
        )
        for attempt in group.attempts:
            attempt.teachable = teachers.can_teach(attempt)
        report.available += sum(attempt.teachable for attempt in group.attempts)
        credits, taught = _credits(group, algorithm, teachers, report)
        prompt_ids = array("i", group.prompt.token_ids)  # shared by the samples
        group.samples = [
            _sample(attempt, group.prompt.uid, prompt_ids, credits[i], taught.get(i, []), algorithm)
            for i, attempt in enumerate(group.attempts)
        ]
        for i, attempt in enumerate(group.attempts):
            attempt.why = _why(attempt, algorithm, taught.get(i, []), could_teach=teachers.can_teach(attempt))
        report.add(group)
    algorithm.balance(groups)
    return report


def may_count(rollout: Rollout, algorithm: Algorithm) -> bool:
    """Whether it may be in the loss at all; its reward is part of the group's mean in any case."""
    return not _left_out(rollout, algorithm)


def _left_out(rollout: Rollout, algorithm: Algorithm) -> str:
    """Why it may not be in the loss; "" if it may."""
    if algorithm.mask_truncated and rollout.finish_reason == "length":
        return "cut at rollout.max_response_length"
    if rollout.stale:
        return "older than rollout.max_staleness"
    return "" if np.isfinite(rollout.trained_logprobs).all() else "log-probs are not finite"


def _why(attempt: Attempt, algorithm: Algorithm, shown: Sequence[Shown], *, could_teach: bool) -> str:
    """Why it has its branch. `could_teach`: there was something to show a teacher, whether or not it fitted."""
    outcome = "correct" if attempt.correct else "wrong"
    left_out = _left_out(attempt.rollout, algorithm)
    if left_out:
        return f"{outcome}, left out: {left_out}"
    if shown:
        cut = ", cut to fit" if any(prompt.truncated for prompt in shown) else ""
        return f"{outcome}, taught by {shown[0].source}{cut}"
    if not algorithm.needs.teacher or attempt.teachable:
        return outcome
    return f"{outcome}, " + ("no teacher prompt fits" if could_teach else "nothing to show a teacher")


def _require_finite(group: Group) -> None:
    for attempt in group.attempts:
        if not math.isfinite(attempt.reward.score):
            raise UserError(
                f"the reward of prompt {group.prompt.uid}, sample {attempt.rollout.sample} (kind "
                f"{group.prompt.kind!r}) is {attempt.reward.score}: expected a finite number; correct the reward "
                "function so that it returns one for every response"
            )


def _credits(
    group: Group, algorithm: Algorithm, teachers: GroupTeachers, report: RoutingReport
) -> tuple[list[Credit], Taught]:
    """The algorithm's credit, once every attempt that it teaches has a teacher prompt."""
    taught: Taught = {}
    counts = [may_count(attempt.rollout, algorithm) for attempt in group.attempts]
    while True:
        credits = [
            credit if counted else Credit({}, credit.advantage)
            for credit, counted in zip(algorithm.credit(group), counts, strict=True)
        ]
        missing = [i for i, credit in enumerate(credits) if credit.taught and i not in taught]
        if not missing:
            return credits, {i: found for i, found in taught.items() if credits[i].taught}
        for i in missing:
            attempt = group.attempts[i]
            assert attempt.teachable, f"algorithm {algorithm.name} teaches an attempt that has no teacher"
            shown = [teachers.prompt(attempt), *([teachers.contrast(attempt)] if algorithm.needs.contrast else [])]
            fitting = [prompt for prompt in shown if prompt is not None]
            attempt.teachable = len(fitting) == len(shown)
            if attempt.teachable:
                taught[i] = fitting
                report.taught += 1
                report.truncated += any(prompt.truncated for prompt in fitting)
            else:
                report.unfit += 1


def _sample(
    attempt: Attempt, uid: str, prompt_ids: array[int], credit: Credit,
    taught: list[Shown], algorithm: Algorithm,
) -> Sample:  # fmt: skip
    rollout = attempt.rollout
    streams = [Stream(shown.ids, rollout.token_ids, rollout.trained) for shown in taught]
    return Sample(
        uid=uid,
        sample=rollout.sample,
        student=Stream(prompt_ids, rollout.token_ids, rollout.trained),
        rollout_logprobs=rollout.trained_logprobs,
        advantage=credit.advantage,
        weights=_regularised(credit.weights, algorithm),
        teacher=streams[0] if streams else None,
        teacher_sample=taught[0].sibling if taught else None,
        contrast=streams[1] if streams[1:] else None,
        experts=rollout.experts,
    )


def _regularised(weights: Mapping[str, PerToken], algorithm: Algorithm) -> dict[str, PerToken]:
    """Terms that weigh 0 are left out. The KL to the reference and the entropy bonus regularise the policy gradient, so
    they carry its weight: a token that is only distilled is already held by its teacher."""
    found = {name: weight for name, weight in weights.items() if weighs(weight)}
    coefficients = {"kl": algorithm.kl_loss_coef, "entropy": algorithm.entropy_coef}
    gradient = [found[name] for name in ("policy", "guided") if name in found]
    if gradient:
        weight = sum(gradient[1:], start=gradient[0])
        found |= {name: weight * value for name, value in coefficients.items() if value and name not in found}
    return found
