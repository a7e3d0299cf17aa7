"""The objective does not depend on how an episode is split into samples: loss, metrics and gradients of whole steps."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_srpo.algorithms.routing import route
from megatron_srpo.core.records import Attempt, Context, Group, Prompt, Reward, Rollout
from tests.distributed.test_routed_objective import (
    GRADIENT_BOUND,
    METRIC_BOUND,
    VOCAB,
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

    def teacher_prompt(prompt, solution, feedback):
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
