"""The alarm for collapsing responses: what it watches, what it says, and what it leaves alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_srpo.batching.collapse import CollapseAlarm
from megatron_srpo.config import Config


def config_of(**sections):
    return Config(**{"model": {"path": "m"}, "data": {"train": "d"}} | sections)


def seen(length, correct=None, **metrics):
    found = {"response_length/mean": float(length), **metrics}
    return found | ({} if correct is None else {"srpo/response_length_correct": float(correct)})


def warnings_of(alarm, series, start=0):
    said = []
    log = SimpleNamespace(warn=said.append)
    reasons = [alarm.watch(start + number, metrics, log) for number, metrics in enumerate(series, 1)]
    return said, [reason for reason in reasons if reason]


def watch(series, **sections):
    return warnings_of(CollapseAlarm(config_of(**sections), {}), series)


def shrinking(steps=30, start=400.0, end=20.0):
    return [start + (end - start) * i / (steps - 1) for i in range(steps)]


def test_shrinking_responses_give_one_warning_that_names_what_falls_and_what_helps():
    series = [
        seen(length, length, **{"srpo/teacher_entropy": length / 400, "actor/optimizer_steps": 97})
        for length in [400.0] * 10 + [100.0] * 10
    ]
    (warning,), reasons = watch(series)
    assert not reasons
    assert warning.startswith("iteration 17: responses collapse. Means of 10 iterations, the highest and now: ")
    assert "response length 400 → 190 tokens (48%)" in warning and "teacher entropy 1 → 0.475 nats (48%)" in warning
    assert "first token" not in warning
    for cure in ("algorithm.sibling_min_length = 0.8", 'teacher.mode = "refresh" or "frozen"', "0.7% initial model",
                 "algorithm.distill_iterations"):  # fmt: skip
        assert cure in warning


def test_long_responses_are_told_in_whole_tokens():
    (warning,), _ = watch([seen(12345.4, 12345.4)] * 10 + [seen(4000, 4000)] * 10)
    assert "response length 12345 → 5669 tokens (46%)" in warning


def test_lengths_that_halve_again_are_told_again():
    said, _ = watch([seen(length, length) for length in [400.0] * 10 + [120.0] * 20 + [30.0] * 20])
    assert ["response length 400" in said[0], "response length 120" in said[1], len(said)] == [True, True, 2]


@pytest.mark.parametrize(
    ("series", "why"),
    [
        ([seen(400, 100)] * 10 + [seen(100, 100)] * 20, "only wrong responses became shorter: it learned to stop"),
        ([seen(100, 100, **{"srpo/teacher_entropy": 1 / (i + 1)}) for i in range(40)], "entropies fall as it learns"),
        ([seen(length, length) for length in shrinking(end=250)], "a moderate fall"),
        ([seen(400)] * 12 + [seen(100, 100)] * 9, "correct responses are too new to judge"),
        ([seen(400, 400)] * 4 + [seen(1, 1)] * 5, "no ten iterations yet"),
        ([seen(float("nan"), 100)] * 30, "nothing was measured"),
        ([{}] * 30, "nothing is logged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_collapse_is_no_alarm(series, why):
    assert watch(series) == ([], [])


def test_a_smaller_fall_together_with_an_entropy_is_an_early_alarm():
    series = [seen(100, 100, **{"actor/first_token_entropy": 2.0})] * 10
    series += [seen(60, 60, **{"actor/first_token_entropy": 0.01})] * 10
    (warning,), _ = watch(series)
    assert "entropy of the first token 2 → " in warning
    assert watch([{**one, "actor/first_token_entropy": 2.0} for one in series]) == ([], [])


def test_a_smaller_fall_together_with_the_reward_is_an_early_alarm():
    series = [seen(100, 100, **{"critic/score/mean": 0.6})] * 10 + [seen(60, 60, **{"critic/score/mean": 0.2})] * 10
    (warning,), _ = watch(series)
    assert warning.startswith("iteration 17: ") and "reward 0.6 → 0.32 (53%)" in warning
    assert watch([{**one, "critic/score/mean": 0.6} for one in series]) == ([], [])


@pytest.mark.parametrize(
    ("name", "before", "harmless", "alarming"),
    [
        ("srpo/teacher_entropy", 2.0, 0.52, 0.48),  # a quarter
        ("actor/first_token_entropy", 2.0, 0.52, 0.48),
        ("critic/score/mean", 0.6, 0.46, 0.44),  # three quarters
    ],
)
def test_an_early_alarm_needs_an_entropy_or_a_reward_below_its_share(name, before, harmless, alarming):
    for after, alarms in ((harmless, 0), (alarming, 1)):
        said, _ = watch([seen(100, 100, **{name: before})] * 10 + [seen(60, 60, **{name: after})] * 10)
        assert len(said) == alarms


def test_responses_that_stop_ending_are_an_alarm_only_if_the_reward_falls_too():
    healthy = seen(100, 100, **{"critic/score/mean": 0.6, "response_length/clip_ratio": 0.0})
    endless = seen(105, 100, **{"critic/score/mean": 0.1, "response_length/clip_ratio": 0.6})
    (warning,), _ = watch([healthy] * 10 + [endless] * 5)
    assert "share of responses that end 1 → 0.76 (76%)" in warning and "reward 0.6 → 0.4" in warning
    assert watch([healthy] * 10 + [{**endless, "critic/score/mean": 0.6}] * 10) == ([], [])  # it thinks longer
    assert watch([healthy] * 10 + [{**endless, "response_length/clip_ratio": 0.0}] * 10) == ([], [])


def test_responses_of_which_none_is_correct_any_more_are_still_watched():
    (warning,), _ = watch([seen(400, 400)] * 10 + [seen(20)] * 8)
    assert warning.startswith("iteration 16: ")


def test_the_share_is_configuration_and_zero_switches_it_off():
    series = [seen(length, length) for length in [100.0] * 10 + [60.0] * 20]
    assert watch(series) == ([], [])
    for share in (0.7, 0.9):  # above 0.75 too the warning names what falls
        (warning,), _ = watch(series, train={"collapse_share": share})
        assert "response length 100 → " in warning
    assert watch([seen(100, 100)] * 10 + [seen(1, 1)] * 20, train={"collapse_share": 0}) == ([], [])


def test_by_choice_it_is_a_reason_to_stop_once_and_a_resumed_run_goes_on():
    series = [seen(length, length) for length in [400.0] * 10 + [20.0] * 10]
    config = config_of(train={"stop_on_collapse": True})
    alarm = CollapseAlarm(config, {})
    said, (reason,) = warnings_of(alarm, series[:16])
    assert len(said) == 1 and "train.stop_on_collapse" in reason
    resumed = CollapseAlarm(config, json.loads(json.dumps(alarm.state_dict())))
    fallen = warnings_of(alarm, series[16:], start=16)
    assert warnings_of(resumed, series[16:], start=16) == fallen
    steady = CollapseAlarm(config, json.loads(json.dumps(resumed.state_dict())))
    assert warnings_of(steady, [seen(20, 20)] * 10, start=20)[1] == []


def test_a_checkpoint_keeps_the_history():
    series = [seen(length, length) for length in [400.0] * 10 + [20.0] * 10]
    first = CollapseAlarm(config_of(), {})
    assert warnings_of(first, series[:12]) == ([], [])
    resumed = CollapseAlarm(config_of(), json.loads(json.dumps(first.state_dict())))
    assert len(warnings_of(resumed, series[12:], start=12)[0]) == 1


@pytest.mark.parametrize(
    ("sections", "wanted", "unwanted"),
    [
        ({"algorithm": {"name": "grpo"}}, "algorithm.kl_loss_coef", "sibling"),
        ({"algorithm": {"name": "sdpo"}}, "sibling_min_length", "distill_iterations"),
        ({"teacher": {"mode": "refresh"}}, 'teacher.refresh_when = "improved"', "EMA"),
        ({"algorithm": {"teachers": ["sibling", "solution"]}}, 'algorithm.teachers without "solution"', "no settings"),
        ({"algorithm": {"teachers": ["sibling"]}}, "distill_iterations", "algorithm.teachers"),
        ({"teacher": {"mode": "frozen"}, "algorithm": {"sibling_min_length": 0.9}}, "distill_iterations", "min_length"),
    ],
)
def test_only_settings_that_the_run_can_use_are_advised(sections, wanted, unwanted):
    (warning,), _ = watch([seen(400, 400)] * 10 + [seen(180, 180)] * 10, **sections)
    assert wanted in warning and unwanted not in warning
