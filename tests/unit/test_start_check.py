"""The comparison of trainer and engine before the first iteration: what it refuses, and that it leaves no trace."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Padding, Prompt, Rollout
from megatron_srpo.losses.objective import Objective
from megatron_srpo.run.start_check import START, check_start, probes, routing_note, start_limit
from tests.unit.test_config_check import QWEN3_30B_A3B

PROMPTS = [Prompt(f"train:{i}", (), [3, 4, 5 + i], "", "exact") for i in range(3)]


def configured(**changes) -> Config:
    sections: dict[str, dict] = {"model": {"path": "m"}, "data": {"train": "d"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return Config(**sections)


class Alone:
    """A control channel of one rank."""

    def share(self, compute):
        return compute()


class FakePolicy:
    """Every token has log-prob −1."""

    padding = Padding()

    def __init__(self, events):
        self.events = events

    @contextmanager
    def on_host(self):
        self.events.append("trainer to host")
        yield
        self.events.append("trainer back")

    def weights(self, which):
        self.events.append(which)
        return nullcontext()

    def score(self, rows, score):
        self.rows = rows
        return [{"logprob": torch.full((row.input_ids.numel(),), -1.0)} for row in rows]

    def sum_over_data(self, values):
        return values


class FakeEngine:
    """Every token has log-prob −1 − `gap`."""

    def __init__(self, gap, events):
        self.gap, self.events = gap, events

    def generate(self, requests, sampling):
        self.events.append("generate")
        self.requests, self.sampling = requests, sampling
        length = sampling.max_tokens
        values = [-1.0 - self.gap] * length
        found = [Rollout(r.prompt, r.sample, [1] * length, values, "", "length", 0) for r in requests]
        for request, rollout in zip(requests, found, strict=True) if sampling.experts else ():
            rollout.experts = np.zeros((len(request.token_ids) + length - 1, 2, 2), dtype=np.uint8)
        return found

    def sleep(self):
        self.events.append("sleep")


def checked(config, gap):
    events: list[str] = []
    engine = FakeEngine(gap, events)
    text = check_start(config, Alone(), engine, FakePolicy(events), Objective(config), probes(config, PROMPTS))
    return text, engine, events


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"model__dtype": "float32"}, 0.01),
        ({"model__dtype": "bfloat16"}, 0.15),
        ({"model__dtype": "bfloat16", "model__fp8": "hybrid"}, 0.3),
        ({"rollout__start_mismatch_limit": 0.5}, 0.5),
    ],
)
def test_the_limit_is_that_of_the_dtype_unless_one_is_given(changes, limit):
    config = configured(**changes)
    assert start_limit(config) == limit
    assert "agree on 256 tokens" in checked(config, 0.9 * limit)[0]
    with pytest.raises(UserError) as refused:
        checked(config, 1.1 * limit)
    for cause in ("rope_theta", "tie_word_embeddings", "another version", "dtype", "compare-logits --hf m"):
        assert cause in str(refused.value)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_a_log_prob_that_is_no_number_is_refused(limit):
    with pytest.raises(UserError, match="differ by nan"):
        checked(configured(rollout__start_mismatch_limit=limit), math.nan)


def test_a_few_hundred_tokens_are_compared_however_short_responses_and_data_are():
    _, engine, _ = checked(configured(rollout__max_response_length=5), 0.0)
    assert (len(engine.requests), engine.sampling.max_tokens, engine.sampling.ignore_eos) == (52, 5, True)
    assert {request.prompt for request in engine.requests} == set(range(52))
    assert len({request.seed for request in engine.requests}) == 52 and START < -1


def test_engine_and_trainer_take_turns_on_the_memory_as_in_an_iteration():
    config = configured(rollout__sleep_while_training=True, train__offload_while_generating=True)
    _, _, events = checked(config, 0.0)
    assert events == ["trainer to host", "generate", "sleep", "trainer back", "student"]


def test_no_generator_of_the_run_is_drawn_from():
    before = torch.get_rng_state()
    checked(configured(), 0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_a_model_with_experts_is_told_who_chooses_them_and_which_metric_shows_it(key):
    hf = {name: value for name, value in QWEN3_30B_A3B.items() if name != "num_experts"} | {key: 128}
    told = {mode: routing_note(configured(rollout__routing_replay=mode), hf) for mode in ("auto", "old", "off")}
    assert "384 bytes per token" in told["auto"] and "rollout_corr/experts_differ" in told["auto"]
    for mode in ("old", "off"):
        assert "independently" in told[mode] and "rollout_corr/logprob_diff_mean" in told[mode]
        assert 'rollout.routing_replay = "rollout" avoids it' in told[mode]
    assert "later optimizer steps" in told["old"] and "later optimizer steps" not in told["off"]
    assert routing_note(configured(), hf | {key: 0}) is None and routing_note(configured(), {}) is None


@pytest.mark.parametrize("experts", [False, True])
def test_the_engines_experts_are_asked_for_and_used_where_the_training_does(experts):
    events: list[str] = []
    engine, policy = FakeEngine(0.0, events), FakePolicy(events)
    config = configured()
    check_start(config, Alone(), engine, policy, Objective(config), probes(config, PROMPTS), experts=experts)
    assert engine.sampling.experts is experts
    assert all((row.experts is not None) is experts for row in policy.rows)
