"""When distillation hands over to reinforcement, and what the weights of SRPO do then."""

from __future__ import annotations

import json
import math
from array import array
from types import SimpleNamespace

import pytest

from megatron_srpo.algorithms.history import NoHistories
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.batching.handover import GAP, Handover
from megatron_srpo.batching.source import DriverSource
from megatron_srpo.config import Config
from megatron_srpo.core.records import Padding
from tests.unit.test_dynamic_sampling import MIXED, batch


def config_of(**keys):
    return Config(model={"path": "m"}, data={"train": "d"}, algorithm=keys)


def watch(handover, gaps, start=0):
    """`since` after each of the gaps; None stands for an iteration that distilled nothing."""
    seen = []
    for iteration, gap in enumerate(gaps, start):
        handover.watch(iteration, {} if gap is None else {GAP: gap})
        seen.append(handover.since)
    return seen


def test_it_hands_over_when_the_mean_gap_has_had_no_new_lowest_value_for_as_many_iterations():
    handover = Handover(config_of(distill_patience=3), {})
    # means of three from the third on: 8, 7, 6 (lowest), 6, 6.3, 6.7 (third without a lower one, iteration 7)
    assert watch(handover, [9, 8, 7, 6, 5, 7, 7, 6]) == [None] * 7 + [8]
    assert handover.watch(99, {}) == {"srpo/handed_over": 1.0}


def test_a_gap_that_keeps_falling_and_one_that_is_noisy_around_a_fall_go_on():
    assert watch(Handover(config_of(distill_patience=3), {}), [1 / (i + 1) for i in range(60)])[-1] is None
    noisy = [10 - 0.1 * i + (0.8 if i % 2 else -0.8) for i in range(60)]
    assert watch(Handover(config_of(distill_patience=6), {}), noisy)[-1] is None


def test_a_run_that_is_resumed_with_less_patience_than_it_has_waited_hands_over():
    patient = Handover(config_of(distill_patience=9), {})
    assert watch(patient, [2.0] * 15)[-1] is None
    resumed = Handover(config_of(distill_patience=3), json.loads(json.dumps(patient.state_dict())))
    assert watch(resumed, [2.0], start=15) == [16]


def test_iterations_without_a_gap_are_not_counted():
    handover = Handover(config_of(distill_patience=2), {})
    assert watch(handover, [2, 2, None, math.nan, None, 2, None, 2])[-2:] == [None, 8]


def test_routing_follows_the_handover_that_the_trainer_feeds():
    config = config_of(distill_patience=2)
    handover = Handover(config, {})
    source = DriverSource(
        config, None, None, None, lambda *lesson, **known: SimpleNamespace(ids=array("i", [1, 2]), truncated=False),
        NoHistories(), None, dp_size=1, padding=Padding(), engine_metrics=dict, handover=handover,
    )  # fmt: skip
    found = []
    for iteration in range(5):
        (group,) = batch(MIXED)
        source._route([group], iteration)
        found.append(dict(group.samples[1].weights))
        handover.watch(iteration, {GAP: 1.0})
    assert handover.since == 4
    assert found == [{"distill": 1.0}] * 4 + [{"policy": 1.0}]


def test_without_patience_nothing_is_watched_logged_or_saved():
    for keys in ({}, {"name": "grpo"}, {"name": "sdpo"}):
        handover = Handover(config_of(**keys), {})
        assert watch(handover, [1.0] * 50)[-1] is None
        assert handover.watch(99, {}) == {} and handover.state_dict() == {}


def test_a_handover_stays_when_its_setting_is_taken_away():
    done = Handover(config_of(distill_patience=3), {})
    watch(done, [5.0] * 10)
    assert done.since is not None
    once = Handover(config_of(), done.state_dict())
    assert Handover(config_of(), once.state_dict()).since == once.since == done.since


def test_a_checkpoint_keeps_it_at_every_point():
    gaps = [9, 8, 7, 6, 5, 7, 7, 6, 5, 4]
    whole = watch(Handover(config_of(distill_patience=3), {}), gaps)
    for cut in range(len(gaps)):
        first = Handover(config_of(distill_patience=3), {})
        before = watch(first, gaps[:cut])
        resumed = Handover(config_of(distill_patience=3), json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert before + watch(resumed, gaps[cut:], start=cut) == whole


@pytest.mark.parametrize(
    ("keys", "handed_over", "weights"),
    [
        ({}, None, [1, 1, 1, 1, 1, 1]),
        ({"distill_iterations": 2}, None, [1, 1, 0, 0, 0, 0]),
        ({"distill_patience": 9}, None, [1, 1, 1, 1, 1, 1]),
        ({"distill_patience": 9}, 2, [1, 1, 0, 0, 0, 0]),
        ({"distill_patience": 9, "distill_decay": 3}, 2, [1, 1, 0.75, 0.5, 0.25, 0]),
        ({"distill_patience": 9, "distill_iterations": 4}, 2, [1, 1, 0, 0, 0, 0]),
        ({"distill_patience": 9, "distill_iterations": 1}, 2, [1, 0, 0, 0, 0, 0]),
    ],
)
def test_the_weight_falls_from_the_handover_on(keys, handed_over, weights):
    srpo = algorithm("srpo", **keys)
    assert [srpo.distill_weight(iteration, handed_over) for iteration in range(6)] == weights
