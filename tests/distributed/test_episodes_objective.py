"""Whole steps on episodes: loss, metrics and gradients do not depend on how an episode is split into samples, and with
feedback at its turn they equal float64's on streams that are made by hand."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_srpo.algorithms.routing import route
from megatron_srpo.core.records import Attempt, Context, Episode, Gap, Group, Prompt, Reward, Rollout, Stream
from tests.distributed.test_routed_objective import (
    GRADIENT_BOUND,
    METRIC_BOUND,
    VOCAB,
    check_steps,
    make_config,
    make_groups,
    make_models,
    run_variants,
)
from tests.distributed_harness import run_distributed

VARIANT = "srpo in two steps, tool answers"  # its loss is the mean of the responses' means, which lengths decide


def episodes(model, *, split):
    """The groups of the harness, with the environment's tokens in the middle of the longer responses. With `split` the
    model's turn behind these tokens is a sample of its own, whose context is everything before."""
    config = make_config(model, VARIANT)
    groups = []
    for samples in make_groups(model, VARIANT):
        first = samples[0]
        prompt = Prompt(first.uid, (), list(first.student.prompt_ids), "", "exact")
        group = Group(prompt, [])
        for sample in samples:
            group.attempts.append(attempt_of(sample, prompt, split=split))
        groups.append(group)

    def teacher_prompt(prompt, solution, feedback, *, solution_ids=None):
        number = int(solution.replace(".", ""))
        shown = [1 + (number + 3 * i) % (VOCAB - 1) for i in range(9)]
        own = len(next(group.prompt.token_ids for group in groups if group.prompt.uid == prompt.uid))
        ids = [*prompt.token_ids[:own], *shown, *prompt.token_ids[own:]]
        return SimpleNamespace(ids=array("i", ids), truncated=False)

    route(groups, config.algorithm, seed=3, iteration=1, teacher_prompt=teacher_prompt)
    return [group.samples for group in groups]


def attempt_of(sample, prompt, *, split):
    trained = sample.student.trained
    logprobs = array("f", [0.0] * len(trained))
    for at, value in zip(trained.nonzero()[0], sample.rollout_logprobs, strict=True):
        logprobs[at] = value
    right = sample.advantage > 0 or (sample.advantage == 0 and sample.uid == "train:2")
    text = f"{sample.uid.removeprefix('train:')}.{sample.sample}"
    rollout = Rollout(0, sample.sample, sample.student.response_ids, logprobs, text, "stop", 0, trained=trained)
    if split and not trained.all():
        begin = int((~trained).nonzero()[0][-1]) + 1
        before = array("i", [*prompt.token_ids, *rollout.token_ids[:begin]])
        rollout = replace(rollout, contexts=(Context(begin, before, ()),))
    return Attempt(rollout, Reward(float(right)), right)


@pytest.mark.parametrize("layout", ["serial", pytest.param("tp2 sp pp2", marks=pytest.mark.slow)])
def test_a_split_episode_trains_as_a_whole_one(tmp_path_factory, layout):
    student, teacher = make_models(tmp_path_factory, "qwen3", "float32")
    whole, split = (episodes(student, split=split) for split in (False, True))
    parts = [sample.part for sample in itertools.chain(*split)]
    assert len(parts) > len(list(itertools.chain(*whole))) and max(parts) == 1
    assert any(sample.teacher is not None and sample.part == 1 for sample in itertools.chain(*split))
    ranks = {"serial": 1, "tp2 sp pp2": 4}[layout]
    steps = [
        run_distributed(run_variants, ranks, [VARIANT], layout, student, teacher, {VARIANT: groups})[0][VARIANT]
        for groups in (whole, split)
    ]
    assert len(steps[0]) == len(steps[1]) == 2
    for one, other in zip(*steps, strict=True):
        assert one["loss_tokens"] == other["loss_tokens"] and one["responses"] == other["responses"]
        told = [{k: v for k, v in step["metrics"].items() if not k.startswith("perf/")} for step in (one, other)]
        assert told[1] == pytest.approx(told[0], rel=METRIC_BOUND, abs=METRIC_BOUND)
        largest = max(float(value.abs().max()) for value in one["gradients"].values())
        assert largest > 0
        for name, value in one["gradients"].items():
            error = float((other["gradients"][name] - value).abs().max())
            assert error <= GRADIENT_BOUND * largest, name


def shown(words):
    """The tokens of a feedback, which is a number."""
    return array("i", [1 + (7 * int(words) + 3 * i) % (VOCAB - 1) for i in range(int(words))])


def told_episodes(model):
    """The groups of the harness, taught by feedback: on the first turn, on the second, on both. And by hand the stream
    that each teacher must read."""
    algorithm = make_config(model, VARIANT).algorithm.model_copy(update={"teachers": ["feedback"]})
    groups, by_hand = [], []
    for samples in make_groups(model, VARIANT):
        prompt = Prompt(samples[0].uid, (), list(samples[0].student.prompt_ids), "", "exact")
        groups.append(Group(prompt, []))
        for sample in samples:
            attempt = attempt_of(sample, prompt, split=False)
            groups[-1].attempts.append(attempt)
            ids, trained = attempt.rollout.token_ids, attempt.rollout.trained
            words = ("4", "5") if sample.sample % 3 == 0 else ("", "3") if sample.sample % 3 == 1 else ("6", "")
            if trained.all():
                attempt.turn_feedback = (words[0] or "2",)
                prompt_ids, read, mask = array("i", prompt.token_ids) + shown(attempt.turn_feedback[0]), ids, trained
            else:
                begin, end = (int(place) for place in (~trained).nonzero()[0][[0, -1]])
                end += 1
                middle = (begin + end) // 2
                gap = Gap(1, begin, end, ids[begin:middle], ids[middle:end])
                turns = (begin, len(ids) - end)
                attempt.rollout.episode = Episode(turns, [], "", None, answers=(0, 2), gaps=(gap,))
                attempt.turn_feedback = words
                more = shown(words[1]) if words[1] else array("i")
                prompt_ids = array("i", prompt.token_ids) + (shown(words[0]) if words[0] else array("i"))
                read = ids[:middle] + more + ids[middle:]
                mask = np.concatenate([trained[:middle], np.zeros(len(more), dtype=bool), trained[middle:]])
            by_hand.append(Stream(prompt_ids, read, mask))

    def teacher_prompt(prompt, solution, feedback, turns=None, *, solution_ids=None):
        ids = array("i", prompt.token_ids) + (shown(feedback) if feedback else array("i"))
        filled = [gap.before + shown(words) + gap.after for gap, words in turns.gaps] if turns else []
        return SimpleNamespace(ids=ids, truncated=False, filled=filled)

    route(groups, algorithm, seed=3, iteration=1, teacher_prompt=teacher_prompt, feedback_at_turn=True)
    return [group.samples for group in groups], by_hand


@pytest.mark.parametrize(
    "layout", ["serial", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tp2 sp pp2", "cp2"))]
)
def test_a_step_with_feedback_at_its_turn_equals_float64(tmp_path_factory, layout):
    student, teacher = make_models(tmp_path_factory, "qwen3", "float32")
    groups, by_hand = told_episodes(student)
    samples = list(itertools.chain(*groups))
    taught = [(sample, stream) for sample, stream in zip(samples, by_hand, strict=True) if sample.teacher is not None]
    inside = [len(sample.teacher.response_ids) > len(sample.student.response_ids) for sample, _ in taught]
    assert any(inside) and not all(inside)
    for sample, stream in taught:
        assert list(sample.teacher.token_ids) == list(stream.token_ids)
        assert sample.teacher.trained.tolist() == stream.trained.tolist()
    ranks = {"serial": 1, "tp2 sp pp2": 4, "cp2": 2}[layout]
    found = run_distributed(run_variants, ranks, [VARIANT], layout, student, teacher, {VARIANT: groups})[0]
    for sample, stream in taught:
        sample.teacher = stream  # what the reference reads
    for step in found[VARIANT]:  # the reference knows no turns
        by_turn = [step["metrics"].pop(f"rollout_corr/logprob_diff_turn_{turn}") for turn in (1, 2)]
        assert all(float(gap) > 0 for gap in by_turn)
    check_steps(found[VARIANT], samples, student, teacher, VARIANT, layout)
