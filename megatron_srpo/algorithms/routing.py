"""Groups → credit → samples. Everything behind routing executes the weights that it wrote into the samples."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_srpo.algorithms.base import Algorithm, SelfTeaching
from megatron_srpo.algorithms.report import RoutingReport
from megatron_srpo.algorithms.teachers import GroupTeachers, Shown, TeacherPromptFunction
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Attempt, Credit, Group, PerToken, Rollout, Sample, Stream, weighs

# Index of an attempt → its teacher's prompts, and with Needs.contrast the second ones: each a list by sequence.
Taught = dict[int, list[list[Shown]]]


def route(
    groups: Sequence[Group], algorithm: Algorithm, *, seed: int, iteration: int, teacher_prompt: TeacherPromptFunction,
    feedback_with_solution: bool = False, feedback_at_turn: bool = False,
) -> RoutingReport:  # fmt: skip
    """Give every group its samples, in the order of its attempts, and report what was done. An attempt has one sample,
    or one for each sequence of its episode.

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
            group, settings, teacher_prompt, feedback_with_solution=feedback_with_solution,
            feedback_at_turn=feedback_at_turn, seed=seed,
        )  # fmt: skip
        for attempt in group.attempts:
            attempt.teachable = teachers.can_teach(attempt)
        report.available += sum(attempt.teachable for attempt in group.attempts)
        left_out = [_left_out(attempt.rollout, algorithm) for attempt in group.attempts]
        credits, taught = _credits(group, algorithm, teachers, report, [not reason for reason in left_out])
        # Samples that begin alike share one array, and the prompt's place in a packed row (batching/rows.py).
        prompts = {None: array("i", group.prompt.token_ids)}  # type: dict[bytes | None, array[int]]
        group.samples = [
            sample
            for i, attempt in enumerate(group.attempts)
            for sample in _samples(attempt, group.prompt.uid, prompts, credits[i], taught.get(i, []), algorithm)
        ]
        _compare_experts(group.samples)
        for i, attempt in enumerate(group.attempts):
            could_teach = teachers.can_teach(attempt)
            attempt.why = _why(attempt, algorithm, taught.get(i, []), left_out[i], could_teach=could_teach)
        report.add(group, {i for i, reason in enumerate(left_out) if reason})
    algorithm.balance(groups)
    return report


def may_count(rollout: Rollout, algorithm: Algorithm) -> bool:
    """Whether it may be in the loss at all; its reward is part of the group's mean in any case."""
    return not _left_out(rollout, algorithm)


def _left_out(rollout: Rollout, algorithm: Algorithm) -> str:
    """Why it may not be in the loss; "" if it may."""
    if rollout.episode is not None and not rollout.episode.turns:
        return "its environment did not start"
    if algorithm.mask_truncated and rollout.finish_reason == "length":
        turns = rollout.episode is not None and rollout.episode.cut == "turns"
        return "cut at environment.max_turns" if turns else "cut at rollout.max_response_length"
    if rollout.stale:
        return "older than rollout.max_staleness"
    return "" if rollout.finite else "log-probs are not finite"


def _why(
    attempt: Attempt, algorithm: Algorithm, shown: Sequence[Sequence[Shown]], left_out: str, *, could_teach: bool
) -> str:
    """Why it has its branch. `could_teach`: there was something to show a teacher, whether or not it fitted."""
    outcome = "correct" if attempt.correct else "wrong"
    if left_out:
        return f"{outcome}, left out: {left_out}"
    if shown:
        cut = ", cut to fit" if any(prompt.truncated for prompts in shown for prompt in prompts) else ""
        return f"{outcome}, taught by {shown[0][0].source}{cut}"
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
    group: Group, algorithm: Algorithm, teachers: GroupTeachers, report: RoutingReport, counts: Sequence[bool]
) -> tuple[list[Credit], Taught]:
    """The algorithm's credit, once every attempt that it teaches has a teacher prompt. `counts`: whether each attempt
    may be in the loss."""
    taught: Taught = {}
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
            whole = [teachers.prompts(attempt), *([teachers.contrasts_of(attempt)] if teachers.contrasts else [])]
            fitting = [prompts for prompts in whole if prompts is not None]
            attempt.teachable = len(fitting) == len(whole)
            if attempt.teachable:
                taught[i] = fitting
                report.taught += 1
                report.truncated += any(prompt.truncated for prompts in fitting for prompt in prompts)
            else:
                report.unfit += 1


def _samples(
    attempt: Attempt, uid: str, prompts: dict[bytes | None, array[int]], credit: Credit,
    taught: list[list[Shown]], algorithm: Algorithm,
) -> Iterator[Sample]:  # fmt: skip
    """One sample for each sequence of the attempt. They share its credit, so that the objective does not depend on how
    an episode is split."""
    rollout = attempt.rollout
    weights, logprobs = _regularised(credit.weights, algorithm), rollout.trained_logprobs
    sequences, done, turn = rollout.sequences, 0, 0
    for part, (context, begin, end) in enumerate(sequences):
        whole = len(sequences) == 1  # then the arrays are shared, not copied
        ids = rollout.token_ids if whole else rollout.token_ids[begin:end]
        trained = rollout.trained if whole else rollout.trained[begin:end]
        count = len(logprobs) if whole else int(np.count_nonzero(trained))
        here = done, done + count  # its share of the attempt's trained tokens
        turns = _turns_in(rollout, here)
        key, own = (None, None) if context is None else (context.token_ids.tobytes(), context.token_ids)
        begin_ids = prompts[None] if own is None else prompts.setdefault(key, own)
        streams = [Stream(shown[part].ids, *_with_gaps_filled(ids, trained, shown[part])) for shown in taught]
        yield Sample(
            uid=uid,
            sample=rollout.sample,
            student=Stream(begin_ids, ids, trained),
            rollout_logprobs=logprobs[here[0] : here[1]],
            advantage=_of_tokens(credit.advantage, here),
            weights={name: _of_tokens(weight, here) for name, weight in weights.items()},
            teacher=streams[0] if streams else None,
            teacher_sample=taught[0][0].sibling if taught else None,
            contrast=streams[1] if streams[1:] else None,
            part=part,
            attempt_length=None if whole else len(logprobs),
            turns=turns,
            first_turn=turn,
            experts=rollout.experts_of(part),
        )
        done, turn = here[1], turn + len(turns)


def _compare_experts(samples: Sequence[Sample]) -> None:
    """Set `same_experts` of a group's samples. The engine may have computed a prompt's last tokens once per sample, in
    batches of other sizes, and rounding decides between near equals."""
    by_prompt: dict[int, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(id(sample.student.prompt_ids), []).append(sample)
    for mine in by_prompt.values():
        known = [sample.experts[: len(sample.student.prompt_ids) - 1] for sample in mine if sample.experts is not None]
        if not known:
            continue
        least = min(map(len, known)) if len(known) == len(mine) else 0
        for other in known[1:]:
            same = (known[0][:least] == other[:least]).all(axis=(1, 2))
            least = least if same.all() else int(same.argmin())
        for sample in mine:
            sample.same_experts = least


def _with_gaps_filled(
    ids: array[int], trained: NDArray[np.bool_], shown: Shown
) -> tuple[array[int], NDArray[np.bool_]]:  # fmt: skip
    """A sequence's tokens behind its prompt as its teacher reads them. Those of the policy are the same."""
    if not shown.filled:
        return ids, trained  # shared, not copied
    read, masks, done = array("i"), [], 0
    for gap, tokens in shown.filled:
        assert not trained[gap.begin : gap.end].any(), "a gap has the environment's tokens alone"
        read += ids[done : gap.begin] + tokens
        masks += [trained[done : gap.begin], np.zeros(len(tokens), dtype=bool)]
        done = gap.end
    return read + ids[done:], np.concatenate([*masks, trained[done:]])


def _turns_in(rollout: Rollout, tokens: tuple[int, int]) -> tuple[int, ...]:
    """Lengths of the turns that these of its trained tokens are made of; a sequence holds whole turns."""
    if rollout.episode is None:
        return ()
    found, begin = [], 0
    for length in rollout.episode.turns:
        if tokens[0] <= begin < tokens[1]:
            found.append(length)
        begin += length
    return tuple(found)


def _of_tokens(value: PerToken, tokens: tuple[int, int]) -> PerToken:
    return value[tokens[0] : tokens[1]] if isinstance(value, np.ndarray) else value


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
