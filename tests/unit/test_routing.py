"""Routing: the tables of the paper's appendix for all methods, and what must hold for any group."""

from __future__ import annotations

import json
import math
import pickle
from array import array
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.algorithms.advantages import group_advantages, leave_one_out_advantages
from megatron_srpo.algorithms.drift import difficulty
from megatron_srpo.algorithms.history import PromptHistories
from megatron_srpo.algorithms.report import branch
from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.section import NAMES, algorithm
from megatron_srpo.algorithms.teachers import stable_hash
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import History, Needs, Prompt, Reward, Rollout, Sample
from megatron_srpo.core.tensors import Guidance
from tests.made_samples import make_groups

METHODS = ("srpo", "grpo", "sdpo", "mix", "rloo")
LATER = ("drift", "scsdpo", "rlsd", "rlrt", "contrastive", "demopsd")  # tested below, and in the whole step
POLICY, DISTILL, OUT = {"policy": 1.0}, {"distill": 1.0}, {}
MIXED = {"policy": 0.9, "distill": 1.0 - 0.9}


@dataclass
class FakeTeacherPrompt:
    ids: array
    truncated: bool = False


@dataclass
class Teacher:
    """Records what it is asked for; `fits` and `truncates` by the solution's text."""

    calls: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    known: list[array | None] = field(default_factory=list)  # the tokens that came with each
    fits: bool = True
    truncated: bool = False

    def __call__(
        self, prompt: Prompt, solution: str | None, feedback: str | None, *, solution_ids=None
    ) -> FakeTeacherPrompt | None:
        self.calls.append((prompt.uid, solution, feedback))
        self.known.append(solution_ids)
        return FakeTeacherPrompt(array("i", [*prompt.token_ids, 7, 7]), self.truncated) if self.fits else None


def prompt_of(index: int) -> Prompt:
    return Prompt(f"train:{index}", ({"role": "user", "content": "?"},), [1, 2, index], "a", "exact")


def rollout_of(sample: int, prompt: int = 0, length: int = 3, finish: str = "stop") -> Rollout:
    return Rollout(prompt, sample, [5] * length, [-0.5] * length, f"text {prompt}.{sample}", finish, 0)


def run(scores, method, *, feedback=None, teacher=None, lengths=None, seed=0, iteration=0, with_solution=False, **keys):
    """Route one group with these scores; returns (samples, report)."""
    method = algorithm(method, **keys)
    feedback = feedback or [None] * len(scores)
    lengths = lengths or [3] * len(scores)
    groups = make_groups(
        [prompt_of(0)],
        [rollout_of(i, length=n) for i, n in enumerate(lengths)],
        [Reward(score, said) for score, said in zip(scores, feedback, strict=True)],
        threshold=method.success_reward_threshold,
    )  # fmt: skip
    report = route(
        groups, method,
        seed=seed, iteration=iteration, teacher_prompt=teacher or Teacher(), feedback_with_solution=with_solution,
    )  # fmt: skip
    return groups[0].samples, report


def route_plain(prompts, rollouts, rewards, method, teacher=None):
    """(samples of all groups, report)."""
    groups = make_groups(prompts, rollouts, rewards, threshold=method.success_reward_threshold)
    report = route(groups, method, seed=0, iteration=0, teacher_prompt=teacher or Teacher())
    return [sample for group in groups for sample in group.samples], report


def weights(samples: list[Sample]) -> list[dict[str, float]]:
    return [dict(sample.weights) for sample in samples]


# ---- the tables ------------------------------------------------------------------------------------------------------

TABLES = {
    # scores, feedback on, feedback: weights by method. A correct rollout's teacher is another correct one.
    "mixed group": (
        [1, 0, 1, 0], False, None,
        {"srpo": [POLICY, DISTILL, POLICY, DISTILL], "grpo": [POLICY] * 4, "sdpo": [DISTILL] * 4, "mix": [MIXED] * 4},
    ),
    "all wrong": (
        [0, 0, 0], False, None,
        {"srpo": [POLICY] * 3, "grpo": [POLICY] * 3, "sdpo": [OUT] * 3, "mix": [POLICY] * 3},
    ),
    "all right": (
        [1, 1, 1], False, None,
        {"srpo": [POLICY] * 3, "grpo": [POLICY] * 3, "sdpo": [DISTILL] * 3, "mix": [MIXED] * 3},
    ),
    "single correct": (
        [0, 1, 0], False, None,
        {
            "srpo": [DISTILL, POLICY, DISTILL], "grpo": [POLICY] * 3,
            "sdpo": [DISTILL, OUT, DISTILL], "mix": [MIXED, POLICY, MIXED],
        },
    ),
    "feedback only": (
        [0, 0, 0], True, ["bad digit", None, "  "],
        {
            "srpo": [DISTILL, POLICY, POLICY], "grpo": [POLICY] * 3,
            "sdpo": [DISTILL, OUT, OUT], "mix": [MIXED, POLICY, POLICY],
        },
    ),
    "feedback that is switched off": (
        [0, 0], False, ["bad digit", "bad digit"],
        {"srpo": [POLICY] * 2, "grpo": [POLICY] * 2, "sdpo": [OUT] * 2, "mix": [POLICY] * 2},
    ),
    "a group of one": (
        [1], False, None,
        {"srpo": [POLICY], "grpo": [POLICY], "sdpo": [OUT], "mix": [POLICY]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", TABLES)
def test_weights_follow_the_table(case, method):
    scores, use_feedback, feedback, expected = TABLES[case]
    samples, _ = run(scores, method, feedback=feedback, use_feedback=use_feedback)
    assert weights(samples) == expected["grpo" if method == "rloo" else method]
    for sample in samples:
        assert (sample.teacher is not None) == ("distill" in sample.weights)


def test_every_algorithm_is_in_the_tables():
    assert set(NAMES) == {*METHODS, *LATER}


def test_rloo_asks_for_no_teacher_and_no_top_k_and_leaves_the_attempt_out_of_its_baseline():
    assert algorithm("rloo").needs == algorithm("grpo").needs == Needs()
    samples, _ = run([1, 0, 0.5, 0], "rloo")
    assert [s.advantage for s in samples] == pytest.approx([1 - 0.5 / 3, -1.5 / 3, 0.5 - 1 / 3, -1.5 / 3])
    scores = [0.3, -2.0, 7.0]
    expected = [3 / 2 * value for value in group_advantages(scores)]  # G ÷ (G − 1) times GRPO's
    assert leave_one_out_advantages(scores) == pytest.approx(expected)
    assert leave_one_out_advantages([4.0]) == [0.0]


def test_regularisers_carry_the_weight_of_the_policy_gradient_and_do_not_reach_what_is_only_distilled():
    samples, _ = run([1, 0], "srpo", kl_loss_coef=0.2, entropy_coef=0.5)
    assert weights(samples) == [{"policy": 1.0, "kl": 0.2, "entropy": 0.5}, DISTILL]
    samples, _ = run([1, 1], "mix", kl_loss_coef=0.2)
    assert samples[0].weights["kl"] == pytest.approx(0.18)


def test_tokens_of_the_environment_are_in_the_streams_and_not_trained():
    rollouts = [rollout_of(0, length=4), rollout_of(1, length=4)]
    rollouts[1].trained[1:3] = False
    samples, report = route_plain([prompt_of(0)], rollouts, [Reward(1), Reward(0)], algorithm("srpo"))
    assert samples[1].student.trained.tolist() == [True, False, False, True]
    assert samples[1].teacher.trained.tolist() == [True, False, False, True]
    assert len(samples[1].student) == 7 and samples[1].length == len(samples[1].rollout_logprobs) == 2
    assert report.metrics()["response_length/mean"] == 3
    assert report.metrics()["srpo/sdpo_token_fraction"] == pytest.approx(2 / 6)


def test_an_all_wrong_group_has_no_advantage_and_a_mixed_one_the_distance_to_its_mean():
    assert [s.advantage for s in run([0, 0, 0], "srpo")[0]] == [0, 0, 0]
    assert [s.advantage for s in run([1, 0, 0, 0], "srpo")[0]] == [0.75, -0.25, -0.25, -0.25]


def test_advantages_can_be_divided_by_the_sample_standard_deviation():
    samples, _ = run([1, 0, 0, 0], "grpo", advantage_std=True)
    assert samples[0].advantage == pytest.approx(0.75 / (0.5 + 1e-6))
    assert group_advantages([3.0], divide_by_std=True) == [0.0]
    assert group_advantages([2.0, 2.0], divide_by_std=True) == [0.0, 0.0]


def test_the_threshold_is_correct_itself():
    samples, _ = run([0.5, 0.49], "srpo")
    assert weights(samples) == [POLICY, DISTILL]
    samples, _ = run([0.5, 0.49], "srpo", success_reward_threshold=0.6)
    assert weights(samples) == [POLICY, POLICY]


def test_the_teacher_is_asked_for_distilled_samples_only():
    teacher = Teacher()
    run([1, 0, 1, 0], "grpo", teacher=teacher)
    assert teacher.calls == []
    run([1, 0, 0], "srpo", teacher=teacher)
    assert teacher.calls == [("train:0", "text 0.0", None)]
    teacher.calls.clear()
    run([1, 0, 0], "mix", teacher=teacher, mix_lambda=1.0)
    assert teacher.calls == []


def test_streams_share_the_prompt_of_their_group_and_the_response_of_their_sample_also_when_pickled():
    samples, _ = run([1, 0, 0], "srpo")
    for first, second in (samples[1:], pickle.loads(pickle.dumps(samples[1:]))):
        assert first.student.prompt_ids is second.student.prompt_ids
        assert first.teacher.prompt_ids is second.teacher.prompt_ids  # both were shown the same answer
        assert first.student.response_ids is first.teacher.response_ids
        assert first.student.trained is first.teacher.trained


def test_feedback_is_shown_only_without_a_solution_unless_asked_for():
    says = ["", "wrong digit"]
    for with_solution, expected in ((False, None), (True, "wrong digit")):
        teacher = Teacher()
        run([1, 0], "srpo", feedback=says, use_feedback=True, teacher=teacher, with_solution=with_solution)
        assert teacher.calls == [("train:0", "text 0.0", expected)]
    teacher = Teacher()
    samples, _ = run([0, 0], "srpo", feedback=says, use_feedback=True, teacher=teacher)
    assert teacher.calls == [("train:0", None, "wrong digit")]
    assert samples[1].teacher_sample is None and weights(samples)[1] == DISTILL


def test_every_attempt_reads_the_feedback_on_itself():
    teacher = Teacher()
    run([0, 0], "srpo", feedback=["x", "y"], use_feedback=True, teacher=teacher)
    assert [feedback for _, _, feedback in teacher.calls] == ["x", "y"]


def test_feedback_is_never_shown_when_it_is_switched_off():
    teacher = Teacher()
    run([1, 0], "srpo", feedback=["x", "y"], use_feedback=False, teacher=teacher, with_solution=True)
    assert teacher.calls == [("train:0", "text 0.0", None)]


@pytest.mark.parametrize(("method", "expected"), [("srpo", [POLICY] * 3), ("sdpo", [OUT] * 3), ("mix", [POLICY] * 3)])
def test_a_teacher_prompt_that_does_not_fit_makes_a_sample_unteachable(method, expected):
    samples, report = run([1, 1, 0], method, teacher=Teacher(fits=False))
    assert weights(samples) == expected
    assert all(s.teacher is None and s.teacher_sample is None for s in samples)
    assert report.metrics()["srpo/teacher_prompt_unfit"] == (1 if method == "srpo" else 3)
    assert report.metrics()["srpo/teacher_available_fraction"] == 1


# ---- siblings --------------------------------------------------------------------------------------------------------


def test_a_random_sibling_is_the_same_in_every_process_and_not_always_the_same_one():
    scores = [1] * 4 + [0] * 4
    chosen = [[s.teacher_sample for s in run(scores, "srpo", iteration=i)[0][4:]] for i in range(8)]
    assert chosen == [[s.teacher_sample for s in run(scores, "srpo", iteration=i)[0][4:]] for i in range(8)]
    assert {sample for row in chosen for sample in row} == {0, 1, 2, 3}
    assert stable_hash(0, 1, "train:17", 3) == 13014949586738491870  # pinned: hash() would differ between processes


def test_the_shortest_sibling_teaches():
    samples, _ = run([1, 1, 1, 0], "srpo", lengths=[9, 2, 5, 4], sibling="shortest")
    assert samples[3].teacher_sample == 1
    samples, _ = run([1, 1, 1, 0], "sdpo", lengths=[9, 2, 5, 4], sibling="shortest")
    assert [s.teacher_sample for s in samples] == [1, 2, 1, 1]


def test_ties_are_broken_otherwise_for_every_prompt():
    groups = make_groups(
        [prompt_of(i) for i in range(8)],
        [rollout_of(sample, i) for i in range(8) for sample in range(3)],
        [Reward(score) for _ in range(8) for score in (1, 1, 0)],
    )
    route(groups, algorithm("srpo"), seed=0, iteration=0, teacher_prompt=Teacher())
    assert {group.samples[2].teacher_sample for group in groups} == {0, 1}


def test_least_used_siblings_take_turns():
    samples, _ = run([1, 1, 1] + [0] * 6, "srpo", sibling="least_used")
    taught = [s.teacher_sample for s in samples if s.teacher is not None]
    assert sorted(taught) == [0, 0, 1, 1, 2, 2]


# ---- groups and bad input --------------------------------------------------------------------------------------------


def test_unequal_groups_and_a_missing_sample_are_routed_by_group():
    rollouts = [rollout_of(0, 0), rollout_of(2, 0), rollout_of(0, 1), rollout_of(1, 1), rollout_of(2, 1)]
    rewards = [Reward(1), Reward(0), Reward(0), Reward(0), Reward(0)]
    samples, report = route_plain([prompt_of(0), prompt_of(1)], rollouts, rewards, algorithm())
    assert [(s.uid, s.sample) for s in samples] == [
        ("train:0", 0), ("train:0", 2), ("train:1", 0), ("train:1", 1), ("train:1", 2),
    ]  # fmt: skip
    assert [s.advantage for s in samples] == [0.5, -0.5, 0, 0, 0]
    assert samples[1].teacher_sample == 0
    metrics = report.metrics()
    assert (metrics["srpo/all_wrong_groups"], metrics["srpo/all_right_groups"]) == (1, 0)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_finite_number_is_refused_by_name(score):
    with pytest.raises(UserError, match=r"train:0, sample 1 .*expected a finite number"):
        run([1, score], "grpo")


def test_the_report_measures_what_was_routed():
    rewards = [
        Reward(1.0, well_formed=True), Reward(0.0, well_formed=False), Reward(0.0, error="time-out after 10 s"),
        Reward(1.0),
    ]  # fmt: skip
    rollouts = [rollout_of(0, length=2), rollout_of(1, length=6, finish="length"), rollout_of(2, length=4)]
    rollouts.append(rollout_of(0, prompt=1, length=8))
    _, report = route_plain([prompt_of(0), prompt_of(1)], rollouts, rewards, algorithm(), Teacher(truncated=True))
    third = 1 / 3
    assert report.metrics() == pytest.approx(
        {
            "srpo/sdpo_fraction": 0.5,
            "srpo/grpo_fraction": 0.5,
            "srpo/left_out_fraction": 0,
            "rollout/nonfinite_samples": 0,
            "rollout/stale_samples": 0,
            "srpo/teacher_available_fraction": 0.5,
            "srpo/sdpo_token_fraction": 0.5,
            "srpo/all_wrong_groups": 0,
            "srpo/all_right_groups": 1,
            "srpo/teacher_prompt_truncated": 2,
            "srpo/teacher_prompt_unfit": 0,
            "srpo/teacher_prompt_truncated_fraction": 1.0,
            "srpo/teacher_prompt_unfit_fraction": 0.0,
            "critic/score/mean": 0.5,
            "critic/score/max": 1,
            "critic/score/min": 0,
            "critic/score/std": 0.5,
            "critic/advantages/mean": (2 * 2 * third - 10 * third) / 20,
            "critic/advantages/max": 2 * third,
            "critic/advantages/min": -third,
            "reward/errors": 1,
            "reward/error_fraction": 0.25,
            "reward/accuracy": 0.5,
            "kind/exact/prompts": 2,
            "kind/exact/score": 0.5,
            "kind/exact/accuracy": 0.5,
            "kind/exact/error_fraction": 0.25,
            "kind/exact/response_length": 5,
            "srpo/well_formed_fraction": 0.5,
            "response_length/mean": 5,
            "response_length/max": 8,
            "response_length/min": 2,
            "response_length/clip_ratio": 0.25,
            "srpo/response_length_correct": 5,
            "srpo/response_length_wrong": 5,
        }
    )


def test_truncated_responses_are_left_out_by_choice_and_still_count_in_the_baseline():
    teacher = Teacher()
    ends = ["stop", "length", "stop", "length"]
    samples, report = route_plain(
        [prompt_of(0)], [rollout_of(i, finish=end) for i, end in enumerate(ends)],
        [Reward(score) for score in (1.0, 0.0, 0.0, 1.0)], algorithm(mask_truncated=True), teacher,
    )  # fmt: skip
    assert weights(samples) == [POLICY, OUT, DISTILL, OUT]
    assert [s.advantage for s in samples] == [0.5, -0.5, -0.5, 0.5]
    assert len(teacher.calls) == 1  # none for what is left out
    assert report.metrics()["srpo/left_out_fraction"] == 0.5


def test_left_out_samples_are_in_no_denominator():
    metrics = run([0, 1, 0], "sdpo", lengths=[2, 50, 4])[1].metrics()
    assert metrics["srpo/sdpo_token_fraction"] == 1
    assert metrics["srpo/sdpo_fraction"] == pytest.approx(2 / 3)
    assert "srpo/well_formed_fraction" not in metrics


# ---- properties ------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """Groups of unequal size with any scores, some feedback, any method."""
    prompts = draw(st.integers(1, 4))
    rollouts, rewards = [], []
    for prompt in range(prompts):
        for sample in sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=6))):
            rollouts.append(rollout_of(sample, prompt, draw(st.integers(0, 9))))
            score = draw(st.sampled_from([0.0, 1.0]) | st.floats(-10, 10))
            rewards.append(Reward(score, draw(st.sampled_from([None, "", "why"]))))
    method = algorithm(
        draw(st.sampled_from(METHODS)),
        use_feedback=draw(st.booleans()),
        sibling=draw(st.sampled_from(["random", "shortest", "least_used"])),
        advantage_std=draw(st.booleans()),
    )
    return [prompt_of(i) for i in range(prompts)], rollouts, rewards, method, draw(st.integers(0, 3))


def route_batch(batch):
    """(samples by group, metrics)."""
    prompts, rollouts, rewards, method, seed = batch
    groups = make_groups(prompts, rollouts, rewards, threshold=method.success_reward_threshold)
    report = route(groups, method, seed=seed, iteration=5, teacher_prompt=Teacher())
    return [group.samples for group in groups], report.metrics()


@settings(max_examples=150, deadline=None)
@given(batches())
def test_whatever_the_group_teachers_are_right_and_weights_are_consistent(batch):
    _, rollouts, rewards, method, _ = batch
    score = {(r.prompt, r.sample): reward.score for r, reward in zip(rollouts, rewards, strict=True)}
    for group, samples in enumerate(route_batch(batch)[0]):
        for sample in samples:
            if sample.teacher_sample is not None:
                assert sample.teacher_sample != sample.sample
                assert score[group, sample.teacher_sample] >= method.success_reward_threshold
            assert (sample.teacher is not None) == ("distill" in sample.weights)
            assert sum(sample.weights.values()) == pytest.approx(1 if sample.counted else 0)
            if method.name == "srpo":
                assert dict(sample.weights) in (POLICY, DISTILL)
                if "distill" in sample.weights:
                    assert score[group, sample.sample] < method.success_reward_threshold


@settings(max_examples=100, deadline=None)
@given(batches())
def test_advantages_sum_to_zero_in_every_group(batch):
    for samples in route_batch(batch)[0]:
        assert sum(s.advantage for s in samples) == pytest.approx(0, abs=1e-8)


@settings(max_examples=50, deadline=None)
@given(batches())
def test_the_same_batch_is_routed_the_same_way_again(batch):
    def facts(found):
        samples = [sample for group in found[0] for sample in group]
        return [(s.uid, s.sample, s.advantage, s.weights, s.teacher_sample) for s in samples], found[1]

    assert facts(route_batch(batch)) == facts(route_batch(batch))


def test_stale_rollouts_are_counted_and_left_out_of_the_loss_but_not_of_the_groups_mean():
    rollouts = [rollout_of(0), rollout_of(1), rollout_of(2)]
    rollouts[1].stale = True
    rewards = [Reward(1.0), Reward(0.0), Reward(0.5)]
    samples, report = route_plain([prompt_of(0)], rollouts, rewards, algorithm("grpo"))
    assert [sample.counted for sample in samples] == [True, False, True]
    assert [sample.advantage for sample in samples] == [0.5, -0.5, 0.0]
    assert report.metrics()["rollout/stale_samples"] == 1


def shown_by(sources, scores=(0, 0), **keys):
    """What the teacher of each attempt is shown: (solution, feedback)."""
    teacher = Teacher()
    groups = make_groups(
        [replace(prompt_of(0), solution="worked out")],
        [rollout_of(i) for i in range(len(scores))],
        [Reward(score, "said") for score in scores],
    )
    groups[0].history = History(answers=("remembered",))
    method = algorithm("sdpo", teachers=sources, **keys)
    route(groups, method, seed=0, iteration=0, teacher_prompt=teacher)
    return [call[1:] for call in teacher.calls], [sample.teacher for sample in groups[0].samples]


@pytest.mark.parametrize(
    ("sources", "scores", "expected"),
    [
        (["solution"], (0, 0), [("worked out", None)]),
        (["memory"], (0, 0), [("remembered", None)]),
        (["feedback"], (0, 0), [(None, "said")]),
        (["sibling", "solution"], (1, 0), [("worked out", None), ("text 0.0", None)]),
        (["solution", "sibling"], (1, 0), [("worked out", None)]),
        (["sibling", "memory", "feedback"], (0, 0), [("remembered", None)]),
        (["sibling"], (0, 0), []),
    ],
)
def test_the_first_source_that_has_something_teaches(sources, scores, expected):
    assert shown_by(sources, scores)[0] == expected


def test_a_teacher_of_the_control_reads_the_question_alone():
    calls, teachers = shown_by(["none"], (1, 0))
    assert calls == []
    assert [list(stream.prompt_ids) for stream in teachers] == [[1, 2, 0]] * 2


def test_a_sibling_may_be_the_longest_or_the_median_and_none_that_is_far_too_short():
    lengths = [2, 9, 5, 8, 4]  # the last one is wrong
    chosen = {}
    for choice in ("shortest", "longest", "median"):
        samples, _ = run([1, 1, 1, 1, 0], "srpo", lengths=lengths, sibling=choice)
        chosen[choice] = samples[4].teacher_sample
    assert chosen == {"shortest": 0, "longest": 1, "median": 2}
    samples, _ = run([1, 1, 1, 1, 0], "srpo", lengths=lengths, sibling="shortest", sibling_min_length=0.5)
    assert samples[4].teacher_sample == 2  # the median is 6.5
    samples, _ = run([1, 0], "srpo", lengths=[3, 3], sibling_min_length=1.0)
    assert weights(samples) == [POLICY, DISTILL]


def test_srpo_hands_over_from_distillation_to_the_policy_gradient():
    def weight(iteration):
        samples, _ = run([1, 0], "srpo", iteration=iteration, distill_iterations=2, distill_decay=1)
        return dict(samples[1].weights)

    assert [weight(i) for i in range(4)] == [DISTILL, DISTILL, {"policy": 0.5, "distill": 0.5}, POLICY]


@pytest.mark.parametrize(
    ("distill_on", "expected"), [("incorrect", [OUT, OUT, DISTILL]), ("correct", [DISTILL, DISTILL, OUT])]
)
def test_sdpo_may_distil_right_or_wrong_attempts_alone(distill_on, expected):
    assert weights(run([1, 1, 0], "sdpo", distill_on=distill_on)[0]) == expected


def test_the_contrastive_teacher_is_shown_a_right_and_a_wrong_sibling():
    teacher = Teacher()
    samples, _ = run([1, 0, 0], "contrastive", teacher=teacher)
    # The only right one has no right sibling.
    assert weights(samples) == [POLICY, {"guided": 1.0}, {"guided": 1.0}]
    assert [call[1] for call in teacher.calls] == ["text 0.0", "text 0.2", "text 0.1"]
    assert samples[1].contrast is not None and samples[0].contrast is None
    assert weights(run([1, 0], "contrastive")[0]) == [POLICY, POLICY]


def test_a_response_whose_tokens_the_teacher_weighs_is_neither_left_out_nor_plain_grpo():
    samples, report = run([1, 0, 0], "contrastive")
    assert [branch(sample) for sample in samples] == ["grpo", "guided", "guided"]
    shares = report.metrics()
    assert shares["srpo/guided_fraction"] == pytest.approx(2 / 3) and shares["srpo/left_out_fraction"] == 0
    assert shares["srpo/grpo_fraction"] == pytest.approx(1 / 3) and shares["srpo/sdpo_fraction"] == 0
    assert "srpo/guided_fraction" not in run([1, 0], "srpo")[1].metrics()


def test_token_credit_fades_and_only_rlrt_leaves_wrong_responses_alone():
    def of(method, iteration):
        return [dict(weight) for weight in weights(run([1, 1, 0], method, iteration=iteration)[0])]

    half = {"policy": 0.5, "guided": 0.5}
    assert of("rlsd", 0) == [half, half, half]
    assert of("rlrt", 0) == [half, half, POLICY]
    assert of("rlsd", 25) == [{"policy": 0.75, "guided": 0.25}] * 3
    assert of("rlsd", 50) == [POLICY] * 3


def test_the_weights_of_drift_follow_how_hard_the_prompt_has_been():
    def routed(history, iteration=1, **keys):
        groups = make_groups([prompt_of(0)], [rollout_of(i) for i in range(3)], [Reward(1), Reward(1), Reward(0)])
        groups[0].history = history
        route(groups, algorithm("drift", **keys), seed=0, iteration=iteration, teacher_prompt=Teacher())
        return weights(groups[0].samples)

    assert difficulty(History()) == pytest.approx((0.075, 0.85, 0.075), abs=0.01)  # nothing is known: medium
    hard = routed(History(solved=0, failed=1000))
    assert hard[0]["policy"] == pytest.approx(0.3, abs=0.05) and hard[2]["distill"] == pytest.approx(1, abs=0.05)
    easy = routed(History(solved=1000, failed=0))
    assert easy[0]["policy"] == pytest.approx(0.05, abs=0.05) and easy[2]["distill"] == pytest.approx(0.35, abs=0.02)
    assert routed(History(), iteration=0, warmup_iterations=1) == [DISTILL] * 3


def test_sc_sdpo_weighs_prompts_by_how_undecided_the_policy_is():
    rewards = [Reward(score) for score in (1, 0, 1, 1, 1, 0, 1, 1)]
    rollouts = [rollout_of(i % 4, prompt=i // 4) for i in range(8)]
    samples, _ = route_plain([prompt_of(0), prompt_of(1)], rollouts, rewards, algorithm("scsdpo"))
    assert {round(sample.weights["distill"], 6) for sample in samples} == {1.0}  # 3 of 4 in both groups
    rewards[1] = Reward(1)
    samples, _ = route_plain([prompt_of(0), prompt_of(1)], rollouts, rewards, algorithm("scsdpo"))
    assert [sample.weights for sample in samples] == [{}] * 4 + [
        {"distill": 1.0}
    ] * 4  # the mean is over what is trained
    rewards[2:4] = [Reward(0), Reward(0)]
    rollouts += [rollout_of(i, prompt=2) for i in range(4)]
    rewards += [Reward(score) for score in (1, 0, 0, 0)]
    samples, _ = route_plain([prompt_of(i) for i in range(3)], rollouts, rewards, algorithm("scsdpo"))
    weights = [sample.weights["distill"] for sample in samples if sample.weights]
    spread = {1 / 2: 0.5, 1 / 4: math.sqrt(3) / 4}  # √(p(1 − p))
    expected = [spread[1 / 2]] * 4 + [spread[1 / 4]] * 4 + [spread[1 / 4]] * 3  # a lone sibling does not teach itself
    assert weights == pytest.approx([value / (0.5 + math.sqrt(3) / 2) * 3 for value in expected])


def test_histories_fade_forget_duplicates_and_survive_a_checkpoint():
    histories = PromptHistories()

    def group(scores):
        return make_groups([prompt_of(0)], [rollout_of(i) for i in range(len(scores))], [Reward(s) for s in scores])

    for iteration, scores in enumerate([(1, 1, 0), (1, 0, 0)]):
        histories.observe(group(scores), iteration)
    resumed = PromptHistories()
    resumed.observe(make_groups([prompt_of(1)], [rollout_of(0)], [Reward(1)]), 0)
    resumed.load_state_dict(json.loads(json.dumps(histories.state_dict())))
    assert resumed.state_dict() == histories.state_dict()  # of what it saw before, nothing
    for each in (histories, resumed):
        groups = group((0,))
        each.give(groups, 3)
        seen = groups[0].history
        assert seen.solved == pytest.approx((2 * 0.85 + 1) * 0.85**2)
        assert seen.failed == pytest.approx((1 * 0.85 + 2) * 0.85**2)
        assert seen.answers == ("text 0.0", "text 0.1")


def test_a_teacher_prompt_is_made_of_the_tokens_of_its_sibling_where_they_are_known():
    scores, teacher = [1.0, 0.0, 1.0, 0.0, 0.0], Teacher()
    rollouts = [rollout_of(i) for i in range(len(scores))]
    groups = make_groups([prompt_of(0)], rollouts, [Reward(score, None) for score in scores], threshold=0.5)
    groups[0].attempts[2].demonstration = array("i", [2, 2])
    route(groups, algorithm("srpo"), seed=0, iteration=0, teacher_prompt=teacher)
    expected = {"text 0.0": None, "text 0.2": array("i", [2, 2])}
    assert {text for _, text, _ in teacher.calls} == set(expected)  # both have taught
    assert teacher.known == [expected[text] for _, text, _ in teacher.calls]


def test_the_weights_of_drift_are_those_of_its_formulas():
    def routed(scores, history=None, **keys):
        groups = make_groups([prompt_of(0)], [rollout_of(i) for i in range(len(scores))], [Reward(s) for s in scores])
        groups[0].history = history or History()
        route(groups, algorithm("drift", **keys), seed=0, iteration=1, teacher_prompt=Teacher())
        return weights(groups[0].samples)

    # p = 4/12 · 4/6 + 8/12 · 1/2, and p = 8/16 · 1/10 + 8/16 · 1/2
    known = History(solved=3, failed=1), History(solved=0, failed=8)
    assert difficulty(known[0]) == pytest.approx((0.1403957, 0.8204467, 0.0391577), abs=1e-7)
    assert difficulty(known[1]) == pytest.approx((0.0066705, 0.4949971, 0.4983324), abs=1e-7)
    for history, policy, bonus, distill in zip(
        known, (0.8392137, 0.6448303), (0.6885301, 0.3191892), (0.0882961, 0.5006671), strict=True
    ):
        right = {"policy": pytest.approx(policy, abs=1e-7), "guided": pytest.approx(bonus, abs=1e-7)}
        found = routed([1, 1, 0], history, warmup_iterations=1)  # which are over in the iteration number 1
        assert found == [right, right, {"distill": pytest.approx(distill, abs=1e-7)}]
    assert routed([0, 0]) == [POLICY, POLICY]  # nothing to show a teacher
    assert routed([0, 0], warmup_iterations=2) == [OUT, OUT]


def guided(method, advantage, gap, contrast=0.0, **keys):
    seen = Guidance(*(torch.tensor([float(value)]) for value in (advantage, gap, contrast)))
    return algorithm(method, **keys).guide(seen).item()


@pytest.mark.parametrize(
    ("method", "advantage", "gap", "expected"),
    [
        ("rlsd", 2, math.log(1.1), 2.2),  # the teacher finds the token likelier: more of a reward …
        ("rlsd", -2, math.log(1.1), -2 / 1.1),  # … and less of a punishment
        ("rlsd", 2, math.log(3), 2.4),
        ("rlsd", -2, math.log(3), -1.6),
        ("rlsd", 2, -math.log(3), 1.6),
        ("rlrt", 2, math.log(1.1), 2 / 1.1),  # what the student found itself counts more
        ("rlrt", 2, math.log(3), 1.6),
        ("rlrt", 2, -math.log(3), 2.4),
        ("rlrt", -2, -math.log(1.1), -2.2),
        ("drift", 2, -0.2 - math.log(1.5), 1.0),  # surer than the teacher by more than the margin
        ("drift", 2, -0.2, 0.0),
        ("drift", 2, 3, 0.0),
        ("drift", 2, -3, 2.0),  # the largest bonus
    ],
)
def test_a_teachers_view_of_a_token_scales_its_advantage(method, advantage, gap, expected):
    assert guided(method, advantage, gap) == pytest.approx(expected, abs=1e-6)


def test_the_contrastive_advantage_is_half_of_what_the_right_demonstration_has_over_the_wrong_one():
    assert guided("contrastive", 7, 0.3, -0.1) == pytest.approx(0.2)


def test_demopsd_takes_its_share_of_a_tokens_weight_where_the_divergence_is_large():
    demopsd = algorithm("demopsd", damping_max=0.2, damping_rate=50.0)
    found = demopsd.token_weights(torch.tensor([0.0, math.log(3) / 50, 5.0]))  # σ: 0.5, 0.75, 1
    assert found.tolist() == pytest.approx([1.0, 0.9, 0.8])


def test_drift_keeps_histories_also_where_memories_do_not_teach():
    assert algorithm("drift", teachers=["sibling"]).needs.history
    assert not algorithm("srpo").needs.history and algorithm("srpo", teachers=["memory"]).needs.history


def test_where_there_is_no_advantage_to_redistribute_no_teacher_is_asked():
    teacher = Teacher()
    assert weights(run([1, 1, 1], "rlsd", teacher=teacher)[0]) == [POLICY] * 3
    assert teacher.calls == []


def test_a_history_keeps_the_newest_answers_and_the_prompts_that_were_seen_last(monkeypatch):
    def group(prompt, sample):
        one = Rollout(0, sample, [5], [-0.5], f"text {prompt}.{sample}", "stop", 0)
        return make_groups([prompt_of(prompt)], [one], [Reward(1)])[0]

    def answers(prompt):
        asked = group(prompt, 0)
        histories.give([asked], 9)
        return asked.history.answers

    monkeypatch.setattr("megatron_srpo.algorithms.history.PROMPTS", 2)
    histories = PromptHistories()
    for sample in range(6):
        histories.observe([group(0, sample)], sample)
    assert answers(0) == ("text 0.2", "text 0.3", "text 0.4", "text 0.5")
    histories.observe([group(1, 0)], 6)
    histories.observe([group(0, 6)], 7)  # seen again, so that 1 is now the one seen longest ago
    histories.observe([group(2, 0)], 8)
    assert [bool(answers(prompt)) for prompt in range(3)] == [True, False, True]


def test_a_wrong_sibling_is_shown_whatever_its_length():
    samples, _ = run([1, 0, 0], "contrastive", lengths=[9, 2, 9], sibling_min_length=1.0)
    assert weights(samples) == [POLICY, {"guided": 1.0}, {"guided": 1.0}]


def test_other_iterations_show_other_memories():
    shown = []
    for iteration in range(12):
        teacher = Teacher()
        groups = make_groups([prompt_of(0)], [rollout_of(0)], [Reward(0)])
        groups[0].history = History(answers=("one", "two"))
        route(groups, algorithm(teachers=["memory"]), seed=0, iteration=iteration, teacher_prompt=teacher)
        shown += [solution for _, solution, _ in teacher.calls]
    assert len(shown) == 12 and set(shown) == {"one", "two"}
