"""What an algorithm is: a section of the configuration that knows the credit of a group's attempts.

Notation of SRPO (arXiv 2604.02288 §3.1), for attempt i of a group:

    c_i  `attempt.correct`: its score is at least `success_reward_threshold`
    m_i  `attempt.teachable`: there is something to show its teacher
    A_i  its advantage, see advantages.py

To add one: a file here with a class, and its line in `__init__.py`. Nothing outside this folder asks for its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from megatron_srpo.core.records import Credit, Group, Needs
from megatron_srpo.core.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_srpo.core.tensors import Guidance

SourceName = Literal["sibling", "solution", "memory", "feedback", "none"]

SMALLEST_MASK_CAP = 1.05  # bf16 log-probs of trainer and engine differ by a few hundredths of a nat


class Algorithm(Section):
    """A policy-gradient method. Subclasses give `name` a Literal type and default, and implement `credit`."""

    title: ClassVar[str]  # in figures and tables
    colour: ClassVar[str] = ""  # in figures; a free one if empty

    name: str
    """Algorithm that gives each response its credit."""
    success_reward_threshold: float = 0.5
    """A response with at least this reward counts as correct."""
    clip_ratio_low: float = Field(0.2, ge=0, lt=1)
    """Lower clip ε_low of the policy loss: the importance ratio is clipped at 1 − ε_low."""
    clip_ratio_high: float = Field(0.28, ge=0)
    """Upper clip ε_high of the policy loss: the importance ratio is clipped at 1 + ε_high."""
    dual_clip: float = Field(0.0, ge=0)
    """Dual clip of the policy loss: if the advantage A is negative, the loss is at most −dual_clip · A. Must be above
    1; 3 is usual. 0 switches it off."""
    importance_ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of the policy loss. "token" takes one ratio per token, "sequence" the geometric mean over the
    response (GSPO's ratio). For "sequence" set both clips near 4e-4. GSPO's objective also needs loss_aggregation =
    "seq-mean-token-mean"."""
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    """Mean that makes the loss of an optimizer step, with verl's names. "token-mean" is the mean over all trained
    tokens, so that long responses count more (DAPO, SRPO). "seq-mean-token-mean" takes the mean over the tokens of each
    response first, so that each response counts the same (the GRPO and GSPO papers)."""
    mask_truncated: bool = False
    """Leave responses that were cut at max_response_length out of the loss."""
    rollout_correction: Literal["off", "truncate", "mask", "sequence_mask"] = "truncate"
    """Correction of the difference between trainer and engine by importance weights π_old/π_rollout. "truncate" caps
    the weights, "mask" drops tokens above the cap, "sequence_mask" caps the weights and drops responses whose geometric
    mean weight lies outside [1/cap, cap]."""
    rollout_correction_cap: float = Field(2.0, gt=0)
    """Largest importance weight of rollout_correction. Must be at least 1 with "truncate" and 1.05 with the masks."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Coefficient of the KL divergence (k3 estimate) from the initial model. It applies to responses with a policy
    gradient; one that is only distilled is held by its teacher. 0 switches it off."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus. It applies to responses with a policy gradient. 0 switches it off."""

    @field_validator("dual_clip")
    @classmethod
    def _dual_clip_or_off(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("expected a number > 1 (3 is usual), or 0 to switch it off")
        return value

    @property
    def needs(self) -> Needs:
        """What it needs of the rest of the system."""
        return Needs(reference=self.kl_loss_coef > 0)

    @property
    def teaching(self) -> SelfTeaching | None:
        """The settings of its teacher; None for a method without one."""
        return None

    @property
    def distillation(self) -> Distillation | None:
        """The settings of its divergence from the teacher; None for a method without one."""
        return None

    def credit(self, group: Group) -> list[Credit]:
        """One Credit for each attempt, in order.

        Called again for the same group when an attempt that was `taught` turns out to have no teacher prompt that fits:
        it is then no longer `teachable`.
        """
        raise NotImplementedError(type(self).__name__)

    def balance(self, groups: Sequence[Group]) -> None:
        """May change the weights of the routed samples once more, with all groups of the iteration in view."""

    def guide(self, seen: Guidance) -> Tensor:
        """Advantages of single tokens [T], fp32, for the loss term "guided": for a method with Needs.teacher_tokens.

        It runs on every rank inside the loss, after the teacher has scored; nothing of it gets a gradient.
        """
        raise NotImplementedError(type(self).__name__)

    def problems(self) -> Iterator[str]:
        """Contradictions among its own keys, one line each: key, value, why, and the cure."""
        cap, correction = self.rollout_correction_cap, self.rollout_correction
        if correction in ("mask", "sequence_mask") and 1 <= cap < SMALLEST_MASK_CAP:
            yield (
                f'algorithm.rollout_correction_cap = {cap}: algorithm.rollout_correction = "{correction}" drops '
                "weights above it, and rounding in trainer and engine alone can take half or all of the weights there; "
                f'set {SMALLEST_MASK_CAP} or more (2 is usual), or rollout_correction = "truncate"'
            )
        if correction != "off" and cap < 1:
            yield (
                f"algorithm.rollout_correction_cap = {self.rollout_correction_cap}: the weight of a token on which "
                "trainer and engine agree is 1, and a cap below that changes it; set 1 or more (2 is usual)"
            )


class GroupAdvantage(Algorithm):
    """A method whose advantage is the distance to the group's mean."""

    advantage_std: bool = False
    """Divide the advantages of a group by the standard deviation of its rewards."""


class SelfTeaching(GroupAdvantage):
    """A method in which the policy is its own teacher: what the teacher is shown."""

    default_teachers: ClassVar[tuple[SourceName, ...]] = ("sibling",)

    teachers: list[SourceName] = Field([])
    """What the teacher may be shown, in order; the first that exists for a response is shown. "sibling" is a
    correct response of the group, "solution" the data's own solution (data.solution_key), "memory" a correct
    response of an earlier iteration, "feedback" the reward function's feedback. "none" shows the question
    alone, as a control, and is the last if there are several. Empty takes the algorithm's own order: sibling,
    then memory for drift, and sibling for the others."""
    use_feedback: bool = False
    """Let the reward function's feedback teach a response that no other source can teach. The same as "feedback" at the
    end of teachers."""
    sibling: Literal["random", "shortest", "longest", "median", "least_used"] = "random"
    """Which correct sibling teaches: a random one, the one with the shortest, the longest or the median response, or
    the one that has taught least in this group."""
    sibling_min_length: float = Field(0.0, ge=0, le=1)
    """Shortest response that may teach, as a share of the median length of the group's correct responses. Protects from
    collapsing lengths; 0 allows all. It does not apply to the sources "solution" and "memory"."""

    @property
    def teaching(self) -> SelfTeaching:
        return self

    @property
    def sources(self) -> tuple[SourceName, ...]:
        """The order of teacher sources, resolved for the method."""
        chosen = tuple(self.teachers) or self.default_teachers
        return (*chosen, "feedback") if self.use_feedback and "feedback" not in chosen else chosen

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, reference=self.kl_loss_coef > 0, history="memory" in self.sources)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if unused := self.sources[self.sources.index("none") + 1 :] if "none" in self.sources else ():
            key = "algorithm.teachers" if unused[0] in self.teachers else "algorithm.use_feedback"
            yield (
                f'{key}: "none" always has something to show, the question alone, so {unused[0]} behind it never '
                'teaches; let "none" be the last source'
            )
        for name in ("sibling", "sibling_min_length") if "sibling" not in self.sources else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                yield (
                    f"algorithm.{name} = {value!r}: no sibling teaches with algorithm.teachers = "
                    f'{json.dumps(list(self.sources))}; leave it out, or add "sibling"'
                )


class Distillation(SelfTeaching):
    """A method that minimises a divergence from its teacher: SDPO's settings (arXiv 2601.20802)."""

    default_beta: ClassVar[float] = 0.0
    weighs_tokens: ClassVar[bool] = False  # `token_weights` is to be asked

    @property
    def distils_all_wrong(self) -> bool:
        """Whether it distils attempts of a group without any correct one, if there is something to show them."""
        return True

    distillation_topk: int = Field(100, ge=0)
    """Number of the student's most likely tokens on which teacher and student are compared. 0 compares the full
    vocabulary."""
    distillation_tail: bool = True
    """Add one entry for the probability outside the top-k. false renormalises the top-k instead."""
    divergence_alpha: float = Field(0.5, ge=0, le=1)
    """Divergence between teacher q and student p. 0 is the forward KL(q‖p), 1 the reverse KL(p‖q), and values between
    are generalised Jensen–Shannon divergences."""
    distill_ratio_clip: float = Field(2.0, ge=0)
    """Upper clip of the ratio π_θ/π_old that multiplies the distillation loss. Must be at least 1. 0 uses no ratio."""
    entropy_beta: float = Field(-1.0, le=50)
    """Exponent β of the dynamic weights exp(−β · H) of distilled tokens, with the teacher's entropy H in nats. -1 takes
    the algorithm's own value: 1 for srpo, drift and demopsd, 0 for the others."""

    @field_validator("entropy_beta")
    @classmethod
    def _beta_or_default(cls, value: float) -> float:
        if value < 0 and value != -1:
            raise ValueError("expected a number ≥ 0, or -1 for the method's own value")
        return value

    @property
    def needs(self) -> Needs:
        return replace(super().needs, divergence=True, topk=self.distillation_topk)

    @property
    def distillation(self) -> Distillation:
        return self

    @property
    def beta(self) -> float:
        """β of the dynamic weighting (SRPO §3.2), resolved for the method."""
        return self.entropy_beta if self.entropy_beta >= 0 else self.default_beta

    def token_weights(self, divergence: Tensor) -> Tensor:
        """Weights of distilled tokens [T] in addition to exp(−β · H), from the Jensen–Shannon divergence [T] of student
        and teacher in nats, without gradient. Asked only if `weighs_tokens`."""
        raise NotImplementedError(type(self).__name__)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.distillation_topk == 1 and not self.distillation_tail:
            yield (
                "algorithm.distillation_tail = false: with algorithm.distillation_topk = 1 the one token has all the "
                "probability in both distributions, so that nothing is distilled; set it to true, or raise "
                "distillation_topk"
            )
        if 0 < self.distill_ratio_clip < 1:
            yield (
                f"algorithm.distill_ratio_clip = {self.distill_ratio_clip}: the ratio starts at 1, and a clip below "
                "that changes it; set 1 or more (2 is usual), or 0 for no ratio"
            )
