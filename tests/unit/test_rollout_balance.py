"""Which engine answers which request."""

from __future__ import annotations

import random

import pytest

from megatron_srpo.rollout import GenerateRequest
from megatron_srpo.rollout.balance import split_requests


def requests(lengths, samples=1):
    """`samples` requests for each prompt length."""
    return [
        GenerateRequest(prompt, sample, [7] * length, seed=0)
        for prompt, length in enumerate(lengths)
        for sample in range(samples)
    ]


def places(shares):
    return [[(request.prompt, request.sample) for request in share] for share in shares]


def costs(shares, max_tokens):
    return [sum(len(request.token_ids) + max_tokens for request in share) for share in shares]


def test_one_engine_gets_everything_in_order():
    asked = requests([3, 1, 2], samples=2)
    assert split_requests(asked, 1, max_tokens=4) == [asked]


def test_equal_requests_are_dealt_in_equal_runs_that_keep_a_group_together():
    shares = split_requests(requests([5] * 4, samples=3), 4, max_tokens=8)
    assert places(shares) == [[(prompt, sample) for sample in range(3)] for prompt in range(4)]


def test_the_order_of_the_requests_does_not_matter():
    asked = requests([9, 2, 4, 30, 1], samples=3)
    shuffled = random.Random(0).sample(asked, len(asked))
    assert split_requests(shuffled, 3, max_tokens=5) == split_requests(asked, 3, max_tokens=5)


@pytest.mark.parametrize("engines", [2, 3, 7])
def test_no_share_is_off_the_mean_by_more_than_one_request(engines):
    rng = random.Random(1)
    lengths = [rng.randint(1, 50) for _ in range(23)]
    asked = requests(lengths, samples=2)
    shares = split_requests(asked, engines, max_tokens=16)
    assert [place for share in places(shares) for place in share] == places([asked])[0]  # each once, in order
    spent = costs(shares, 16)
    assert max(abs(cost - sum(spent) / engines) for cost in spent) <= 50 + 16


def test_long_prompts_weigh_more_than_many_short_ones():
    shares = split_requests(requests([90, 10, 10, 10]), 2, max_tokens=10)
    assert places(shares) == [[(0, 0)], [(1, 0), (2, 0), (3, 0)]]


def test_engines_may_be_more_than_requests_and_requests_may_be_none():
    assert sorted(map(len, split_requests(requests([4, 4]), 5, max_tokens=3))) == [0, 0, 0, 1, 1]
    assert split_requests([], 3, max_tokens=3) == [[], [], []]
