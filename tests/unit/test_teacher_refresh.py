"""When a "refresh" teacher takes the student's weights."""

import json

import pytest

from megatron_srpo.batching.teacher_refresh import TeacherRefresh
from megatron_srpo.config import Config


def config_of(**teacher):
    return Config(model={"path": "m"}, data={"train": "d"}, teacher={"mode": "refresh", **teacher})


def seen(reward, length=100.0, cut=0.0):
    return {"critic/score/mean": reward, "response_length/mean": length, "response_length/clip_ratio": cut}


def test_it_comes_every_so_many_iterations_and_the_age_is_in_the_log():
    refresh = TeacherRefresh(config_of(refresh_every=3), {})
    due, logged = [], []
    for _ in range(7):
        due.append(refresh.due(seen(0.5)))
        logged.append(refresh.metrics())
    assert due == [False, False, True, False, False, True, False]
    assert [entry["teacher/age"] for entry in logged] == [1, 2, 0, 1, 2, 0, 1]
    assert [entry["teacher/refreshed"] for entry in logged] == [0, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (seen(0.6), True),
        (seen(0.5), False),  # not better than the initial policy
        (seen(0.6, length=79), False),
        (seen(0.6, length=80), True),  # as long as it must be
        (seen(0.6, cut=0.11), False),
    ],
)
def test_the_gate_wants_a_better_student_whose_lengths_are_safe(metrics, expected):
    refresh = TeacherRefresh(config_of(refresh_every=2, refresh_when="improved"), {})
    assert not refresh.due(seen(0.5))
    assert refresh.due(metrics) is expected


def test_it_is_a_ratchet_that_a_checkpoint_keeps():
    refresh = TeacherRefresh(config_of(refresh_every=1, refresh_when="improved"), {})
    assert [refresh.due(seen(reward)) for reward in (0.5, 0.7, 0.6)] == [False, True, False]
    resumed = TeacherRefresh(
        config_of(refresh_every=1, refresh_when="improved"), json.loads(json.dumps(refresh.state_dict()))
    )
    for each in (refresh, resumed):
        assert [each.due(seen(reward)) for reward in (0.65, 0.71)] == [False, True]


def test_lengths_that_shrink_little_by_little_do_not_lower_the_bar():
    refresh = TeacherRefresh(config_of(refresh_every=1, refresh_when="improved"), {})
    rising = [seen(0.5 + 0.01 * i, length=100 * 0.93**i) for i in range(9)]
    assert [refresh.due(each) for each in rising] == [False, True, True, True, *[False] * 5]  # 0.93³ = 0.804
    cut = [seen(0.9 + 0.01 * i, cut=0.06 * i) for i in range(4)]
    assert [refresh.due(each) for each in cut] == [True, True, False, False]


@pytest.mark.parametrize("keys", [{"teacher": {"mode": "ema"}}, {"algorithm": {"name": "grpo"}}])
def test_other_teachers_are_never_refreshed(keys):
    config = Config(**{"model": {"path": "m"}, "data": {"train": "d"}, "teacher": {"mode": "refresh"}} | keys)
    refresh = TeacherRefresh(config, {})
    assert not any(refresh.due({}) for _ in range(20)) and refresh.metrics() == {}
