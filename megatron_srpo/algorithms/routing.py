"""Rollout groups → advantages, branches and teachers: the only module that knows algorithms.

Per rollout i of a group (notation of SRPO, arXiv 2604.02288 §3.1):

    c_i  correct: its score is at least `success_reward_threshold`
    m_i  teachable: another rollout of the group is correct, or there is feedback on it and `use_feedback` is on
    A_i  advantage: r_i − mean of the group, optionally ÷ (standard deviation + 1e-6)

A routing turns (c, m) of a group into two weights a rollout; everything behind this module executes them. To add
one: a function here, its line in `ROUTINGS`, its name in `AlgorithmConfig.name`.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from megatron_srpo.config import AlgorithmConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Prompt, Reward, Rollout, RoutedSample

STD_EPSILON = 1e-6


class Standing(NamedTuple):
    """What a routing may look at: one rollout's place in its group."""

    correct: bool  # c_i
    teachable: bool  # m_i


class Weights(NamedTuple):
    """Weights of a rollout's two token losses; (0, 0) leaves it out of the loss and of the denominator."""

    policy: float
    distill: float


POLICY, DISTILL, LEFT_OUT = Weights(1.0, 0.0), Weights(0.0, 1.0), Weights(0.0, 0.0)

Routing = Callable[[Sequence[Standing], AlgorithmConfig], list[Weights]]


def _grpo(group: Sequence[Standing], algorithm: AlgorithmConfig) -> list[Weights]:
    """Everything learns from the reward."""
    return [POLICY for _ in group]


def _sdpo(group: Sequence[Standing], algorithm: AlgorithmConfig) -> list[Weights]:
    """Everything that can be taught is taught, correct or not; the rest is left out (arXiv 2601.20802)."""
    return [DISTILL if one.teachable else LEFT_OUT for one in group]


def _srpo(group: Sequence[Standing], algorithm: AlgorithmConfig) -> list[Weights]:
    """z^SDPO = (1 − c)·m, z^GRPO = 1 − z^SDPO (arXiv 2604.02288 §3.1)."""
    return [DISTILL if one.teachable and not one.correct else POLICY for one in group]


def _mix(group: Sequence[Standing], algorithm: AlgorithmConfig) -> list[Weights]:
    """λ·ℓ_GRPO + (1 − λ)·ℓ_SDPO on teachable rollouts, GRPO on the others (arXiv 2604.02288 §4.3)."""
    mixed = Weights(algorithm.mix_lambda, 1.0 - algorithm.mix_lambda)
    return [mixed if one.teachable else POLICY for one in group]


ROUTINGS: dict[str, Routing] = {"grpo": _grpo, "sdpo": _sdpo, "srpo": _srpo, "mix": _mix}


class TeacherPromptLike(Protocol):
    """An enriched prompt: its token ids, and whether its demonstration had to be shortened."""

    ids: list[int]
    truncated: bool


# (prompt, text of a correct solution or None, feedback or None) -> an enriched prompt, or None if none fits
TeacherPromptFunction = Callable[[Prompt, str | None, str | None], TeacherPromptLike | None]


def route(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Sequence[Reward], algorithm: AlgorithmConfig, *,
    seed: int, iteration: int, teacher_prompt: TeacherPromptFunction, feedback_with_solution: bool = False,
) -> tuple[list[RoutedSample], RoutingReport]:  # fmt: skip
    """Route one iteration's rollouts.

    `rewards[i]` belongs to `rollouts[i]`; the order of the rollouts does not matter, and groups may have any size.
    `teacher_prompt` is called for rollouts that are distilled, and for no others; where it returns None the rollout is
    routed as one that cannot be taught. Returns the samples sorted by (group, sample). Raises UserError for a reward
    that is not a finite number.
    """
    assert len(rollouts) == len(rewards) and rollouts, "one reward a rollout, and at least one rollout"
    _require_finite(prompts, rollouts, rewards)
    groups: dict[int, list[_Member]] = {}
    for rollout, reward in sorted(zip(rollouts, rewards, strict=True), key=lambda pair: _key(pair[0])):
        correct = reward.score >= algorithm.success_reward_threshold
        groups.setdefault(rollout.prompt, []).append(_Member(rollout, reward, correct))
    router = _GroupRouter(algorithm, teacher_prompt, feedback_with_solution, seed, iteration)
    for index, members in groups.items():
        router.route(prompts[index], members)
    return router.report.samples, router.report


class RewardedGroups:
    """Groups of one iteration: all of one batch, or with `choose` up to `wanted` groups of any number of batches that
    have a contrast (dynamic sampling, DAPO arXiv 2503.14476 §3.2): right and wrong answers, or feedback that may teach.
    Where too few have one, the iteration is smaller; where none has, it is the last batch as it came.
    """

    def __init__(self, wanted: int, algorithm: AlgorithmConfig, *, choose: bool) -> None:
        self._wanted, self._algorithm, self._choose = wanted, algorithm, choose
        self._kept: list[_Group] = []
        self._rest: list[_Group] = []  # the last batch, while nothing has a contrast
        self._counts: Counter[str] = Counter()

    def add(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> None:
        """One generated batch; `rewards[i]` belongs to `rollouts[i]`."""
        groups = [_Group(prompt, []) for prompt in prompts]
        for rollout, reward in zip(rollouts, rewards, strict=True):
            groups[rollout.prompt].members.append((rollout, reward))
        self._counts["generated"] += len(groups)
        chosen = [group for group in groups if not self._choose or self._contrasts(group)]
        self._kept += chosen[: self._wanted - len(self._kept)]
        self._counts["dropped"] += len(groups) - len(chosen)
        self._rest = groups

    def _contrasts(self, group: _Group) -> bool:
        if not any(may_count(rollout, self._algorithm) for rollout, _ in group.members):
            return False
        correct = [reward.score >= self._algorithm.success_reward_threshold for _, reward in group.members]
        if any(correct):
            return not all(correct)
        return self._algorithm.use_feedback and any(reward.feedback for _, reward in group.members)

    @property
    def full(self) -> bool:
        return len(self._kept) >= self._wanted

    @property
    def _groups(self) -> list[_Group]:
        return self._kept or self._rest

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self._groups]

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, `prompt` being the index in `prompts`."""
        return [replace(rollout, prompt=i) for i, group in enumerate(self._groups) for rollout, _ in group.members]

    @property
    def rewards(self) -> list[Reward]:
        return [reward for group in self._groups for _, reward in group.members]

    def metrics(self) -> dict[str, float]:
        """Groups generated and groups without a contrast that were dropped, where groups are chosen."""
        return {f"rollout/{name}_groups": count for name, count in self._counts.items()} if self._choose else {}


def may_count(rollout: Rollout, algorithm: AlgorithmConfig) -> bool:
    """Whether it may be in the loss at all; its reward is part of the group's mean in any case."""
    truncated = algorithm.mask_truncated and rollout.finish_reason == "length"
    return not truncated and not rollout.stale and _all_finite(rollout.logprobs)


@dataclass
class _Group:
    prompt: Prompt
    members: list[tuple[Rollout, Reward]]


def group_advantages(scores: Sequence[float], *, divide_by_std: bool = False) -> list[float]:
    """A_i = r_i − mean(r), ÷ (s + 1e-6) by choice, with s the sample standard deviation (n − 1). One rollout: 0."""
    mean = math.fsum(scores) / len(scores)
    centred = [score - mean for score in scores]
    if not divide_by_std or len(scores) == 1:
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / (len(scores) - 1))
    return [value / (deviation + STD_EPSILON) for value in centred]


def _key(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt, rollout.sample


def _require_finite(prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> None:
    for rollout, reward in zip(rollouts, rewards, strict=True):
        if not math.isfinite(reward.score):
            prompt = prompts[rollout.prompt]
            raise UserError(
                f"the reward of prompt {prompt.uid}, sample {rollout.sample} (kind {prompt.kind!r}) is {reward.score}: "
                "expected a finite number; correct the reward function so that it returns one for every response"
            )


@dataclass
class _Member:
    """A rollout inside its group, and what is decided about it."""

    rollout: Rollout
    reward: Reward
    correct: bool
    teachable: bool = False
    siblings: list[_Member] = field(default_factory=list)  # correct ones, not itself, by sample
    feedback: str | None = None  # that may teach
    teacher: TeacherPromptLike | None = None
    teacher_sample: int | None = None


class _GroupRouter:
    """Routes group after group and keeps the report."""

    def __init__(
        self, algorithm: AlgorithmConfig, teacher_prompt: TeacherPromptFunction, feedback_with_solution: bool,
        seed: int, iteration: int,
    ) -> None:  # fmt: skip
        self._algorithm = algorithm
        self._routing = ROUTINGS[algorithm.name]
        self._teacher_prompt = teacher_prompt
        self._feedback_with_solution = feedback_with_solution
        self._seed, self._iteration = seed, iteration
        self.report = RoutingReport()

    def route(self, prompt: Prompt, members: list[_Member]) -> None:
        for member in members:
            member.siblings = [other for other in members if other.correct and other is not member]
            feedback = (member.reward.feedback or "").strip() if self._algorithm.use_feedback else ""
            member.feedback = feedback or None
            member.teachable = bool(member.siblings or feedback)
        available = sum(member.teachable for member in members)
        weights = self._weights(prompt, members)
        scores = [member.reward.score for member in members]
        advantages = group_advantages(scores, divide_by_std=self._algorithm.advantage_std)
        samples = [
            RoutedSample(
                uid=prompt.uid,
                group=member.rollout.prompt,
                sample=member.rollout.sample,
                prompt_ids=prompt.token_ids,
                response_ids=member.rollout.token_ids,
                rollout_logprobs=member.rollout.logprobs,
                advantage=advantage,
                policy_weight=weight.policy,
                distill_weight=weight.distill,
                teacher_ids=array("i", member.teacher.ids) if weight.distill > 0 else None,
                teacher_sample=member.teacher_sample if weight.distill > 0 else None,
            )
            for member, advantage, weight in zip(members, advantages, weights, strict=True)
        ]
        self.report.add(samples, members, available)

    def _weights(self, prompt: Prompt, members: list[_Member]) -> list[Weights]:
        """The routing's weights; rollouts for which no teacher prompt fits count as not teachable."""
        used: Counter[int] = Counter()
        while True:
            group = [Standing(member.correct, member.teachable) for member in members]
            weights = self._routing(group, self._algorithm)
            counts = [may_count(member.rollout, self._algorithm) for member in members]
            weights = [weight if counted else LEFT_OUT for weight, counted in zip(weights, counts, strict=True)]
            untaught = [m for m, w in zip(members, weights, strict=True) if w.distill > 0 and m.teacher is None]
            if not untaught:
                return weights
            for member in untaught:
                assert member.teachable, f"routing {self._algorithm.name} distils a rollout that has no teacher"
                self._find_teacher(prompt, member, used)
                member.teachable = member.teacher is not None

    def _find_teacher(self, prompt: Prompt, member: _Member, used: Counter[int]) -> None:
        sibling = self._choose(prompt, member, used) if member.siblings else None
        feedback = member.feedback if sibling is None or self._feedback_with_solution else None
        solution = sibling.rollout.text if sibling is not None else None
        member.teacher = self._teacher_prompt(prompt, solution, feedback)
        if member.teacher is None:
            self.report.unfit += 1
            return
        self.report.truncated += bool(member.teacher.truncated)
        if sibling is not None:
            member.teacher_sample = sibling.rollout.sample
            used[sibling.rollout.sample] += 1

    def _choose(self, prompt: Prompt, member: _Member, used: Counter[int]) -> _Member:
        """One of the correct siblings. Ties of the other choices are broken as in "random"."""
        candidates = member.siblings
        if self._algorithm.sibling == "shortest":
            shortest = min(len(other.rollout.token_ids) for other in candidates)
            candidates = [other for other in candidates if len(other.rollout.token_ids) == shortest]
        elif self._algorithm.sibling == "least_used":
            fewest = min(used[other.rollout.sample] for other in candidates)
            candidates = [other for other in candidates if used[other.rollout.sample] == fewest]
        draw = stable_hash(self._seed, self._iteration, prompt.uid, member.rollout.sample)
        return candidates[draw % len(candidates)]


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that depends on `parts` alone: the same in every process, on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


@dataclass
class RoutingReport:
    """What routing saw and did in one iteration. Counts are rollouts unless their name says groups."""

    samples: list[RoutedSample] = field(default_factory=list)
    truncated: int = 0  # teacher prompts whose demonstration was shortened
    unfit: int = 0  # rollouts whose teacher prompt did not fit at any length
    nonfinite: list[str] = field(default_factory=list)  # rollouts left out as the engine's log-probs are not finite
    failed: list[str] = field(default_factory=list)  # rollouts whose reward could not be had, and why
    _members: list[_Member] = field(default_factory=list)
    _available: int = 0
    _all_wrong: int = 0
    _all_right: int = 0

    def add(self, samples: list[RoutedSample], members: list[_Member], available: int) -> None:
        """Count one routed group; `available` of its rollouts had teacher information."""
        self.samples += samples
        self._members += members
        self._available += available
        self._all_wrong += not any(member.correct for member in members)
        self._all_right += all(member.correct for member in members)
        bad = [s for s in samples if not _all_finite(s.rollout_logprobs)]
        self.nonfinite += [f"{s.uid} sample {s.sample}" for s in bad]
        for sample, member in zip(samples, members, strict=True):
            if member.reward.error is not None:
                self.failed.append(f"{sample.uid} sample {sample.sample}: {member.reward.error}")

    def metrics(self) -> dict[str, float]:
        """Values for the log. Names ending in _fraction are shares of rollouts (of loss tokens for
        sdpo_token_fraction); critic/advantages/* is over response tokens, lengths are in tokens."""
        return {**self._branch_metrics(), **self._reward_metrics(), **self._length_metrics()}

    def _branch_metrics(self) -> dict[str, float]:
        n = len(self.samples)
        distilled = [s for s in self.samples if s.distill_weight > 0]
        loss_tokens = sum(len(s.response_ids) for s in self.samples if s.counted)
        return {
            "srpo/sdpo_fraction": len(distilled) / n,
            "srpo/grpo_fraction": sum(s.policy_weight > 0 for s in self.samples) / n,
            "srpo/left_out_fraction": sum(not s.counted for s in self.samples) / n,
            "rollout/nonfinite_samples": len(self.nonfinite),
            "rollout/stale_samples": sum(member.rollout.stale for member in self._members),
            "srpo/teacher_available_fraction": self._available / n,
            "srpo/sdpo_token_fraction": sum(len(s.response_ids) for s in distilled) / max(1, loss_tokens),
            "srpo/all_wrong_groups": self._all_wrong,
            "srpo/all_right_groups": self._all_right,
            "srpo/teacher_prompt_truncated": self.truncated,
            "srpo/teacher_prompt_unfit": self.unfit,
        }

    def _reward_metrics(self) -> dict[str, float]:
        scores = [member.reward.score for member in self._members]
        mean = _mean(scores)
        advantages = [s.advantage for s in self.samples]
        tokens = sum(len(s.response_ids) for s in self.samples)
        metrics = {
            "critic/score/mean": mean,
            "critic/score/max": max(scores),
            "critic/score/min": min(scores),
            "critic/score/std": math.sqrt(_mean([(score - mean) ** 2 for score in scores])),
            "critic/advantages/mean": math.fsum(s.advantage * len(s.response_ids) for s in self.samples)
            / max(1, tokens),
            "critic/advantages/max": max(advantages),
            "critic/advantages/min": min(advantages),
            "reward/errors": len(self.failed),
            "reward/error_fraction": len(self.failed) / len(self.samples),
        }
        formed = [member.reward.well_formed for member in self._members if member.reward.well_formed is not None]
        if formed:
            metrics["srpo/well_formed_fraction"] = _mean(formed)
        return metrics

    def _length_metrics(self) -> dict[str, float]:
        lengths = [len(member.rollout.token_ids) for member in self._members]
        metrics = {
            "response_length/mean": _mean(lengths),
            "response_length/max": max(lengths),
            "response_length/min": min(lengths),
            "response_length/clip_ratio": _mean([m.rollout.finish_reason == "length" for m in self._members]),
        }
        for name, wanted in (("correct", True), ("wrong", False)):
            some = [len(member.rollout.token_ids) for member in self._members if member.correct is wanted]
            if some:
                metrics[f"srpo/response_length_{name}"] = _mean(some)
        return metrics


def _all_finite(values: Sequence[float]) -> bool:
    return bool(np.isfinite(np.asarray(values)).all())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
