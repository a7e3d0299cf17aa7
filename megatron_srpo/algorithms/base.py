"""What an algorithm is: a section of the configuration that knows the credit of a group's attempts.

Notation of SRPO (arXiv 2604.02288 §3.1), for attempt i of a group:

    c_i  `attempt.correct`: its score is at least `success_reward_threshold`
    m_i  `attempt.teachable`: there is something to show its teacher
    A_i  its advantage, see advantages.py

To add one: a file here with a class, and its line in `__init__.py`. Nothing outside this folder asks for its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from megatron_srpo.core.records import Credit, Group, Needs
from megatron_srpo.core.section import Section


class Algorithm(Section):
    """A policy-gradient method. Subclasses give `name` a Literal type and default, and implement `credit`."""

    title: ClassVar[str]  # in figures and tables

    name: str
    """The algorithm."""
    success_reward_threshold: float = 0.5
    """A response whose reward is at least this is correct."""
    clip_ratio_low: float = Field(0.2, ge=0, lt=1)
    """ε_low: the importance ratio is clipped below at 1 − ε_low."""
    clip_ratio_high: float = Field(0.28, ge=0)
    """ε_high: the importance ratio is clipped above at 1 + ε_high."""
    dual_clip: float = Field(0.0, ge=0)
    """Dual clip c > 1: bounds the loss of a token with a negative advantage by c times that advantage. 3 is usual, 0
    switches it off."""
    importance_ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or (GSPO) the geometric mean over the response's tokens. With "sequence" the clip
    ranges are about 4e-4."""
    mask_truncated: bool = False
    """Leaves responses that were cut at rollout.max_response_length out of the loss. Their rewards still count in the
    group's mean."""
    rollout_correction: Literal["off", "truncate", "mask", "sequence_mask"] = "truncate"
    """How tokens are weighted by the importance ratio of the trainer against the rollout engine: not at all, with the
    ratio truncated at the cap, with tokens above the cap left out, or with whole responses left out."""
    rollout_correction_cap: float = Field(2.0, gt=0)
    """Largest importance weight of the trainer against the rollout engine."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the reference policy (the initial model, k3 estimator). 0 switches it off."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus. 0 switches it off."""

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
    def distillation(self) -> Distillation | None:
        """The settings of its teacher; None for a method without one."""
        return None

    def credit(self, group: Group) -> list[Credit]:
        """One Credit for each attempt, in order.

        Called again for the same group when an attempt that was `taught` turns out to have no teacher prompt that fits:
        it is then no longer `teachable`.
        """
        raise NotImplementedError(type(self).__name__)

    def problems(self) -> Iterator[str]:
        """Contradictions among its own keys, one line each: key, value, why, and the cure."""
        if self.rollout_correction != "off" and self.rollout_correction_cap < 1:
            yield (
                f"algorithm.rollout_correction_cap = {self.rollout_correction_cap}: the weight of a token on which "
                "trainer and engine agree is 1, and a cap below that changes it; set 1 or more (2 is usual)"
            )


class GroupAdvantage(Algorithm):
    """A method whose advantage is the distance to the group's mean."""

    advantage_std: bool = False
    """Divides the advantage by the standard deviation of the group's rewards."""


class Distillation(GroupAdvantage):
    """A method in which the policy is its own teacher: SDPO's settings (arXiv 2601.20802)."""

    default_beta: ClassVar[float] = 0.0

    use_feedback: bool = False
    """The environment's feedback may teach, when no sibling is correct."""
    sibling: Literal["random", "shortest", "least_used"] = "random"
    """Which correct sibling teaches."""
    distillation_topk: int = Field(100, ge=0)
    """Student's most probable tokens at which student and teacher are compared, per position. 0 compares them on the
    full vocabulary."""
    distillation_tail: bool = True
    """Compares the probability outside the top-k too, as one more entry. Otherwise both distributions are renormalised
    over the top-k."""
    divergence_alpha: float = Field(0.5, ge=0, le=1)
    """Divergence of student p and teacher q: 0 is the forward KL(q‖p), 1 the reverse KL(p‖q), and values between
    are the generalised Jensen-Shannon divergence."""
    distill_ratio_clip: float = Field(2.0, ge=0)
    """Largest importance ratio of a distilled token. 0 switches the ratio off."""
    entropy_beta: float = Field(-1.0, le=50)
    """β of the dynamic weighting exp(−βH), where H is the teacher's entropy in nats. -1 takes the method's own value: 1
    for SRPO, 0 for the others."""

    @field_validator("entropy_beta")
    @classmethod
    def _beta_or_default(cls, value: float) -> float:
        if value < 0 and value != -1:
            raise ValueError("expected a number ≥ 0, or -1 for the method's own value")
        return value

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, topk=self.distillation_topk, reference=self.kl_loss_coef > 0)

    @property
    def distillation(self) -> Distillation:
        return self

    @property
    def beta(self) -> float:
        """β of the dynamic weighting (SRPO §3.2), resolved for the method."""
        return self.entropy_beta if self.entropy_beta >= 0 else self.default_beta

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if 0 < self.distill_ratio_clip < 1:
            yield (
                f"algorithm.distill_ratio_clip = {self.distill_ratio_clip}: the ratio starts at 1, and a clip below "
                "that changes it; set 1 or more (2 is usual), or 0 for no ratio"
            )
