"""Metrics that say that training goes wrong: the user is told when that begins, and when it is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_srpo.config import Config

LOW_WEIGHT = 0.9  # a correct rollout correction keeps the mean weight close to 1
EXPERTS = "rollout_corr/experts_differ"  # share of tokens; with rollout.routing_replay = "rollout" alone
FEW = 0.05  # share of teacher prompts that may be cut, or not fit, without a warning


@dataclass
class Watch:
    """One metric. `wrong`: whether a value is a reason to warn."""

    name: str  # in the state of a checkpoint
    metric: str
    wrong: Callable[[float], bool]
    warning: str  # with {value}, and maybe {experts}: a sentence about them
    over: str  # with {value}; what is said when the values are right again
    warned: bool = False

    def look(self, metrics: Mapping[str, float]) -> tuple[str, bool] | None:
        """What is to be told, and whether it is a warning; None if nothing has changed."""
        if self.metric not in metrics:
            return None
        value = float(metrics[self.metric])
        before, self.warned = self.warned, self.wrong(value)
        if before == self.warned:
            return None
        experts = metrics.get(EXPERTS)
        named = "" if experts is None else f". In {experts:.0%} of the tokens they would choose different experts"
        return (self.warning if self.warned else self.over).format(value=value, experts=named), self.warned


def _of_experts(config: Config) -> str:
    """What else may be the reason if the model has experts."""
    if config.rollout.routing_replay in ("auto", "rollout"):
        return ""
    return (
        f', or, since rollout.routing_replay = "{config.rollout.routing_replay}", the experts that they choose: set it '
        'to "auto"'
    )


def _of_age(config: Config) -> str:
    """What else may be the reason if responses may be older than the policy."""
    if config.rollout.partial_tokens:
        return (
            ", or earlier weights have sampled a part of the tokens (rollout/older_token_fraction), which is normal "
            "with rollout.partial_tokens"
        )
    return ", or the policy has moved since (rollout/staleness_mean)" if config.rollout.max_staleness else ""


def watches(config: Config) -> list[Watch]:
    """Those of a run."""
    bound = config.rollout.mismatch_warning
    limit = "teacher.max_prompt_length or train.max_tokens_per_gpu"
    found = [
        Watch(
            "weight_warned", "rollout_corr/weight", lambda value: not value >= LOW_WEIGHT,  # NaN is low too
            "algorithm.rollout_correction leaves a mean weight of {value:.3g}, so only this share of the loss remains: "
            "trainer and engine differ, responses are stale, or algorithm.rollout_correction_cap is too low",
            "the mean weight of the rollout correction is {value:.3g} again",
        ),
        Watch(
            "unfit_warned", "srpo/teacher_prompt_unfit_fraction", lambda value: value > FEW,
            "{value:.0%} of the attempts that a teacher should have taught have no teacher prompt that fits, and were "
            f"trained as if nothing could teach them. Raise {limit}",
            "{value:.0%} of the teacher prompts do not fit now",
        ),
        Watch(
            "truncated_warned", "srpo/teacher_prompt_truncated_fraction", lambda value: value > FEW,
            "{value:.0%} of the teacher prompts were too long, and the middle of the demonstration or the end of the "
            f"feedback was left out. Raise {limit}",
            "{value:.0%} of the teacher prompts are cut now",
        ),
    ]  # fmt: skip
    if bound:
        mismatch = Watch(
            "mismatch_warned", "rollout_corr/logprob_diff_mean", lambda value: not value <= bound,  # NaN is wrong too
            "trainer and rollout engine differ by {value:.3g} nats a token on average (rollout.mismatch_warning is "
            f"{bound:g}): weights, temperature or precision differ" + _of_age(config) + _of_experts(config)
            + "{experts}",
            "trainer and rollout engine agree again ({value:.3g} nats a token)",
        )  # fmt: skip
        found.insert(0, mismatch)
    return found
