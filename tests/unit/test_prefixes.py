"""What samples of a group share: all that their prompts have in common, where it saves work."""

from array import array

import numpy as np
import pytest

from megatron_srpo.batching.prefixes import prefixes_of
from megatron_srpo.core.records import Padding, Sample, Stream


def make(prompts, *, response=4, experts=None):
    answer = array("i", [9] * response)
    trained = np.ones(response, dtype=bool)
    known = {}
    return [
        Sample(
            "train:0", number, Stream(known.setdefault(tuple(ids), array("i", ids)), answer, trained),
            np.zeros(response, np.float32), 0.5, {"policy": 1.0}, experts=experts,
        )
        for number, ids in enumerate(prompts)
    ]  # fmt: skip


SHARES = Padding(shares=True)


def ends(samples, padding=SHARES):
    return [[end for _, end in chain] for chain in prefixes_of(range(len(samples)), samples, padding, "student")]


QUESTION = list(range(100, 120))


def test_teachers_that_show_different_answers_share_the_question():
    one, other = [*QUESTION, *[1] * 12], [*QUESTION, *[2] * 12]
    samples = make([one, one, other, QUESTION])
    assert ends(samples) == [[19, 31], [19, 31], [19], [19]]
    keys = [chain[0][0] for chain in prefixes_of(range(4), samples, SHARES, "student")]
    assert len(set(keys)) == 1


def test_turns_share_their_history():
    first, second = [*QUESTION, *[1] * 12], [*QUESTION, *[1] * 12, *[2] * 10]
    assert ends(make([QUESTION, first, second])) == [[19], [19, 31], [19, 31]]


def test_an_episode_may_have_more_turns_than_pythons_stack_is_deep():
    prompts, turns = [QUESTION], 1200
    while len(prompts) < turns:
        prompts.append([*prompts[-1], *range(10)])
    assert ends(make(prompts)) == [[19, *range(29, 19 + 10 * min(i, turns - 2) + 1, 10)] for i in range(turns)]


def test_a_prompt_that_ends_early_does_not_keep_longer_ones_from_sharing_its_last_token():
    history = QUESTION[:8]  # 7 tokens are too few to be shared with the sample that ends here
    assert ends(make([history, [*history, *[1] * 12], [*history, *[2] * 12]])) == [[], [8], [8]]


def test_prompts_of_other_groups_share_nothing():
    one, other = make([QUESTION]), make([QUESTION])
    other[0].uid = "train:1"
    assert ends(one + other) == [[], []]


def test_experts_that_are_used_again_are_known_to_be_equal_for_one_prompt_alone():
    samples = make([QUESTION, QUESTION, [*QUESTION, *[1] * 12]], experts=np.zeros((40, 1, 2), np.uint8))
    assert ends(samples) == [[19], [19], []]


def test_prefixes_end_at_a_multiple():
    assert ends(make([QUESTION] * 2), Padding(4, 4, shares=True)) == [[16], [16]]


@pytest.mark.parametrize(("response", "shared"), [(4, True), (60, True), (4000, False)])
def test_a_prompt_is_shared_where_the_mask_costs_less_than_it_saves(response, shared):
    """20 tokens of 2 samples, in a model whose causal attention costs as much as its products at 1,536 tokens."""
    found = ends(make([QUESTION] * 2, response=response), Padding(shares=True, attention_length=1536))
    assert found == ([[19]] * 2 if shared else [[]] * 2)
    assert ends(make([QUESTION] * 2, response=response)) == [[19]] * 2
