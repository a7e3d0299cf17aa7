"""What routing saw and did in one iteration."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_srpo.core.records import Attempt, Group, Sample

BRANCHES = ("grpo", "sdpo", "mix", "guided", "out")  # what `branch` may return


def branch(sample: Sample) -> str:
    """In words: "grpo", "sdpo", "mix" of both, "guided" (the teacher weighs the tokens of the policy gradient), or
    "out" of the loss."""
    terms = set(sample.weights)
    if "distill" in terms:
        return "mix" if terms & {"policy", "guided"} else "sdpo"
    return "guided" if "guided" in terms else "grpo" if "policy" in terms else "out"


@dataclass
class RoutingReport:
    """Counts are attempts unless their name says groups."""

    groups: list[Group] = field(default_factory=list)
    available: int = 0  # attempts with something to show a teacher
    taught: int = 0  # attempts for which a teacher prompt was built
    truncated: int = 0  # those of them whose demonstration was shortened
    unfit: int = 0  # attempts whose teacher prompt did not fit at any length
    nonfinite: list[str] = field(default_factory=list)  # attempts left out as the engine's log-probs are not finite
    failed: list[tuple[str, str]] = field(default_factory=list)  # attempts whose reward could not be had, and why

    def add(self, group: Group, left_out: Container[int]) -> None:
        """Count one routed group. `left_out`: the numbers of its attempts that may not be in the loss, among them all
        whose log-probs are not finite."""
        self.groups.append(group)
        for number, (attempt, sample) in enumerate(zip(group.attempts, group.first_samples, strict=True)):
            if number in left_out and not attempt.rollout.finite:
                self.nonfinite.append(f"{sample.uid} sample {sample.sample}")
            if attempt.reward.error is not None:
                self.failed.append((f"{sample.uid} sample {sample.sample}", attempt.reward.error))

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    @property
    def attempts(self) -> list[Attempt]:
        return [attempt for group in self.groups for attempt in group.attempts]

    def metrics(self) -> dict[str, float]:
        """Values for the log. Names ending in _fraction are shares of attempts (of loss tokens for
        sdpo_token_fraction); critic/advantages/* is over the tokens of all responses, lengths are in trained tokens."""
        samples, attempts = self.samples, self.attempts
        return {
            **self._branches(samples, attempts),
            **_rewards(attempts, len(self.failed)),
            **_advantages(samples),
            **_lengths(attempts),
            **_drafts(attempts),
            **_episodes(attempts),
            **self._by_kind(),
        }

    def _by_kind(self) -> dict[str, float]:
        """The most important values of each kind of row alone."""
        found: dict[str, float] = {}
        for kind in sorted({group.prompt.kind for group in self.groups}):
            groups = [group for group in self.groups if group.prompt.kind == kind]
            attempts = [attempt for group in groups for attempt in group.attempts]
            found |= {
                f"kind/{kind}/prompts": len(groups),
                f"kind/{kind}/score": _mean([attempt.reward.score for attempt in attempts]),
                f"kind/{kind}/accuracy": _mean([attempt.correct for attempt in attempts]),
                f"kind/{kind}/error_fraction": _mean([attempt.reward.error is not None for attempt in attempts]),
                f"kind/{kind}/response_length": _mean([attempt.rollout.response_length for attempt in attempts]),
            }
        return found

    def _branches(self, samples: Sequence[Sample], attempts: Sequence[Attempt]) -> dict[str, float]:
        firsts = [sample for sample in samples if sample.part == 0]
        n = len(firsts)
        branches = [branch(sample) for sample in firsts]
        loss_tokens = sum(sample.length for sample in samples if sample.counted)
        guided = branches.count("guided")
        correct = [[attempt.correct for attempt in group.attempts] for group in self.groups]
        return {
            "srpo/sdpo_fraction": sum(name in ("sdpo", "mix") for name in branches) / n,
            "srpo/grpo_fraction": sum(name in ("grpo", "mix") for name in branches) / n,
            **({"srpo/guided_fraction": guided / n} if guided else {}),
            "srpo/left_out_fraction": sum(not sample.counted for sample in firsts) / n,
            "rollout/nonfinite_samples": len(self.nonfinite),
            "rollout/stale_samples": sum(attempt.rollout.stale for attempt in attempts),
            "srpo/teacher_available_fraction": self.available / n,
            "srpo/sdpo_token_fraction": sum(sample.distilled for sample in samples) / max(1, loss_tokens),
            "srpo/all_wrong_groups": sum(not any(group) for group in correct),
            "srpo/all_right_groups": sum(all(group) for group in correct),
            "srpo/teacher_prompt_truncated": self.truncated,
            "srpo/teacher_prompt_unfit": self.unfit,
            "srpo/teacher_prompt_truncated_fraction": self.truncated / max(1, self.taught),
            "srpo/teacher_prompt_unfit_fraction": self.unfit / max(1, self.taught + self.unfit),
        }


def _rewards(attempts: Sequence[Attempt], failed: int) -> dict[str, float]:
    scores = [attempt.reward.score for attempt in attempts]
    mean = _mean(scores)
    metrics = {
        "critic/score/mean": mean,
        "critic/score/max": max(scores),
        "critic/score/min": min(scores),
        "critic/score/std": math.sqrt(_mean([(score - mean) ** 2 for score in scores])),
        "reward/accuracy": _mean([attempt.correct for attempt in attempts]),
        "reward/errors": failed,
        "reward/error_fraction": failed / len(attempts),
    }
    formed = [attempt.reward.well_formed for attempt in attempts if attempt.reward.well_formed is not None]
    return metrics | ({"srpo/well_formed_fraction": _mean(formed)} if formed else {})


def _advantages(samples: Sequence[Sample]) -> dict[str, float]:
    totals, tops, lows = [], [], []
    for sample in samples:
        given = np.asarray(sample.advantage, dtype=np.float64)
        totals.append(float(given) * sample.length if given.ndim == 0 else math.fsum(given))
        tops.append(float(given.max(initial=-math.inf)))
        lows.append(float(given.min(initial=math.inf)))
    return {
        "critic/advantages/mean": math.fsum(totals) / max(1, sum(sample.length for sample in samples)),
        "critic/advantages/max": max(tops),
        "critic/advantages/min": min(lows),
    }


def _lengths(attempts: Sequence[Attempt]) -> dict[str, float]:
    lengths = [attempt.rollout.response_length for attempt in attempts]
    metrics = {
        "response_length/mean": _mean(lengths),
        "response_length/max": max(lengths),
        "response_length/min": min(lengths),
        "response_length/clip_ratio": _mean([attempt.rollout.finish_reason == "length" for attempt in attempts]),
    }
    for name, wanted in (("correct", True), ("wrong", False)):
        some = [n for n, attempt in zip(lengths, attempts, strict=True) if attempt.correct is wanted]
        if some:
            metrics[f"srpo/response_length_{name}"] = _mean(some)
    return metrics


def _drafts(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Of speculative decoding; {} if nothing was drafted."""
    drafted = sum(attempt.rollout.drafted for attempt in attempts)
    accepted = sum(attempt.rollout.accepted for attempt in attempts)
    return {"rollout/drafted_tokens": drafted, "rollout/accepted_tokens": accepted} if drafted else {}


def _episodes(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Of the attempts that talked with an environment; {} if none did."""
    rollouts = [attempt.rollout for attempt in attempts if attempt.rollout.episode is not None]
    episodes = [rollout.episode for rollout in rollouts if rollout.episode is not None]
    if not episodes:
        return {}
    turns = [len(episode.turns) for episode in episodes]
    return {
        "episode/turns_mean": _mean(turns),
        "episode/turns_max": max(turns),
        "episode/tool_calls": _mean([episode.tool_calls for episode in episodes]),
        "episode/tool_errors": _mean([episode.tool_errors for episode in episodes]),
        "episode/environment_tokens": _mean([len(rollout.token_ids) - rollout.response_length for rollout in rollouts]),
        "episode/sequences": _mean([len(rollout.sequences) for rollout in rollouts]),
        "episode/out_of_turns_fraction": _mean([episode.cut == "turns" for episode in episodes]),
        "episode/out_of_tokens_fraction": _mean([episode.cut == "tokens" for episode in episodes]),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
