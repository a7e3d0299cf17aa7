"""Groups that are all right or all wrong make room for others, up to a limit."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megatron_srpo.algorithms.contrast import ContrastingGroups
from megatron_srpo.algorithms.history import NoHistories
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.batching.source import DriverSource
from megatron_srpo.config import Config
from megatron_srpo.core.records import History, Padding, Prompt, Reward, Rollout
from tests.made_samples import make_groups

MIXED, RIGHT, WRONG = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def batch(*outcomes, first=0, feedback=None):
    """A group for each pair of scores."""
    prompts = [Prompt(f"train:{first + i}", (), [1], "", "exact") for i in range(len(outcomes))]
    rollouts = [
        Rollout(i, j, [first + i, j], [-1.0] * 2, "", "stop", 0) for i in range(len(outcomes)) for j in range(2)
    ]
    return make_groups(prompts, rollouts, [Reward(score, feedback) for pair in outcomes for score in pair])


def groups_of(wanted, *batches, choose=True, **keys):
    groups = ContrastingGroups(wanted, algorithm(**keys), choose=choose)
    for one in batches:
        groups.add(one)
    return groups


def uids(groups):
    return [group.prompt.uid for group in groups.groups]


def test_a_group_of_which_nothing_may_be_in_the_loss_has_no_contrast():
    cut, whole = batch(MIXED), batch(MIXED, first=1)
    for attempt in cut[0].attempts:
        attempt.rollout.finish_reason = "length"
    assert uids(groups_of(1, cut, whole, mask_truncated=True)) == ["train:1"]
    assert uids(groups_of(1, cut, whole)) == ["train:0"]


def test_a_group_of_which_one_response_may_be_in_the_loss_has_a_contrast():
    cut = batch(MIXED)
    cut[0].attempts[0].rollout.finish_reason = "length"
    assert uids(groups_of(1, cut, batch(MIXED, first=1), mask_truncated=True)) == ["train:0"]


def test_without_a_choice_a_batch_stays_as_it_is():
    groups = groups_of(3, batch(MIXED, RIGHT, WRONG), choose=False)
    assert groups.full and uids(groups) == ["train:0", "train:1", "train:2"] and groups.metrics() == {}


def test_groups_with_a_contrast_fill_the_batch_and_keep_their_rollouts():
    groups = groups_of(2, batch(WRONG, MIXED), batch(RIGHT, MIXED, MIXED, first=10))
    assert groups.full and uids(groups) == ["train:1", "train:11"]
    kept = [(a.rollout.sample, a.rollout.token_ids[0]) for group in groups.groups for a in group.attempts]
    assert kept == [(0, 1), (1, 1), (0, 11), (1, 11)]
    assert [group.scores for group in groups.groups] == [[1.0, 0.0], [1.0, 0.0]]
    assert groups.metrics() == {"rollout/generated_groups": 5, "rollout/dropped_groups": 2}


def test_too_few_make_a_smaller_iteration_and_none_the_last_batch():
    assert uids(groups_of(3, batch(WRONG, MIXED), batch(RIGHT, first=10))) == ["train:1"]
    assert uids(groups_of(3, batch(WRONG, RIGHT), batch(RIGHT, first=10))) == ["train:10"]


@pytest.mark.parametrize(("use_feedback", "kept"), [(True, ["train:0"]), (False, ["train:1"])])
def test_a_group_that_feedback_can_teach_has_a_contrast(use_feedback, kept):
    groups = groups_of(1, batch(WRONG, feedback="no"), batch(MIXED, first=1), use_feedback=use_feedback)
    assert uids(groups) == kept


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"name": "drift"}, ["train:0"]),
        ({"name": "srpo", "teachers": ["sibling", "none"]}, ["train:0"]),
        ({"name": "srpo"}, ["train:1"]),
        ({"name": "rlsd", "teachers": ["memory"]}, ["train:1"]),  # its advantages are 0
        ({"name": "sdpo", "teachers": ["memory"]}, ["train:0"]),
        ({"name": "sdpo", "teachers": ["memory"], "distill_on": "correct"}, ["train:1"]),
        ({"name": "scsdpo", "teachers": ["memory"]}, ["train:1"]),  # its weight is 0
    ],
)
def test_a_group_that_an_earlier_answer_or_the_control_can_teach_has_a_contrast(keys, kept):
    wrong = batch(WRONG)
    wrong[0].history = History(answers=("the right one",))
    assert uids(groups_of(1, wrong, batch(MIXED, first=1), **keys)) == kept


@pytest.mark.parametrize(("refills", "asked"), [(0, [0]), (1, [0, 1]), (5, [0, 1, 2])])
def test_the_trainer_draws_further_batches_until_it_has_enough_or_may_not(refills, asked):
    batches = iter([batch(WRONG, MIXED), batch(RIGHT, RIGHT, first=10), batch(MIXED, MIXED, first=20)])
    numbers, sent = [], []

    def generate(prompts, iteration, refill, timer):
        numbers.append(refill)
        return next(batches)

    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, rollout={"rollout_batch_size": 2, "max_refills": refills}
    )
    control = SimpleNamespace(broadcast=sent.append, failing_together=nullcontext)
    loader = SimpleNamespace(next_batch=lambda: ["prompts"])
    source = DriverSource(
        config, control, generate, loader, None, NoHistories(), None, dp_size=1, padding=Padding(), engine_metrics=dict
    )
    groups = source._groups(0, None)
    found = uids(groups)
    drawn = [["train:0", "train:1"], ["train:10", "train:11"], ["train:20", "train:21"]][: len(asked)]
    assert [group.prompt.uid for group in groups.generated] == [
        uid for batch in drawn for uid in batch
    ]  # for histories
    assert numbers == asked and sent == [["prompts"]] * len(asked)
    assert found == {0: ["train:0", "train:1"], 1: ["train:1"], 5: ["train:1", "train:20"]}[refills]
