"""Responses that go on in the next iteration: which groups are trained when, how old they become, and where a resumed
run goes on. The engine is a real one in the last tests."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_srpo.config import Config, RolloutConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Attempt, Group, Prompt, Reward, Rollout
from megatron_srpo.data import PromptLoader
from megatron_srpo.observe.watches import watches
from megatron_srpo.rollout import (
    GenerateRequest,
    Part,
    PartialPool,
    RolloutError,
    SamplingSettings,
    request_seed,
    under_way,
)
from megatron_srpo.rollout.partial import joined, versions_of
from megatron_srpo.run.engines import build_engine
from megatron_srpo.run.generation import GroupGenerator, Requests
from megatron_srpo.run.partial import PartialFollower, PartialGenerator
from megatron_srpo.run.roles import Driver
from tests.tiny_engines import LONG, MAX_TOKENS, PROMPTS, VOCAB, tiny_engine
from tests.tiny_models import make_tiny_model

ROUND, LONGEST, SAMPLES, PROMPT = 8, 64, 3, 5


def settings(batch=4, extra=3, staleness=2, longest=LONGEST):
    return RolloutConfig(
        rollout_batch_size=batch, partial_groups=extra, partial_tokens=ROUND, max_staleness=staleness,
        max_response_length=longest, n_samples_per_prompt=SAMPLES,
    )  # fmt: skip


def make_pool(rollout, total, prompts=50, salt=0):
    rows = [Prompt(f"train:{i}", (), [i], "", "exact") for i in range(prompts)]

    def seeds(prompt, iteration, again):
        return [r.seed for r in Requests(salt, SAMPLES).of_prompt(prompt, iteration, 0, 0, again)]

    return PartialPool(PromptLoader(rows, 1), seeds, rollout, total=total)


def length_of(seed):
    """Of the whole response: mostly short, some at the limit."""
    return min(LONGEST, 1 + int(random.Random(seed).lognormvariate(2.5, 1.0)))


def respond(part, version):
    """An engine's answer: token n of a response is a function of its seed and n."""
    whole = length_of(part.seed)
    end = min(whole, len(part.begun) + ROUND)
    ids = [(part.seed + n) % 1000 for n in range(len(part.begun), end)]
    reason = "part" if end < whole else "length" if whole == LONGEST else "stop"
    experts = np.arange(PROMPT + end - 1, dtype=np.uint8)[:, None, None] + np.uint8(version)
    return Rollout(
        part.prompt, part.sample, ids, [-ids[0] / 7] * len(ids), f"{whole}", reason, version, experts=experts
    )  # fmt: skip


def iterate(pool):
    """One iteration: the trained groups."""
    prompts, rollouts = pool.next_batch(), []
    while parts := pool.next_round(rollouts):
        assert len({(part.prompt, part.sample) for part in parts}) == len(parts)
        rollouts = [respond(part, pool.iteration) for part in parts]
    scored = [Group(prompt, []) for prompt in prompts]
    for rollout in pool.complete:
        scored[rollout.prompt].attempts.append(Attempt(rollout, Reward(len(rollout.token_ids) / 3, "why"), False))
    return pool.take(scored)


def facts(groups):
    return [
        (group.prompt.uid, a.rollout, a.rollout.experts.tolist(), a.reward, a.correct)
        for group in groups
        for a in group.attempts
    ]


@pytest.mark.parametrize(
    ("batch", "extra", "staleness"), [(4, 1, 1), (4, 4, 1), (4, 3, 2), (2, 6, 3), (4, 2, 8), (1, 1, 1), (3, 9, 3)]
)
def test_every_iteration_trains_whole_groups_and_none_is_older_than_the_bound(batch, extra, staleness):
    total, ages, seen = 40, Counter(), []
    for salt in range(5):
        pool = make_pool(settings(batch, extra, staleness), total, prompts=1000, salt=salt)
        for iteration in range(total):
            groups = iterate(pool)
            assert len(groups) == batch
            for place, group in enumerate(groups):
                assert [attempt.rollout.sample for attempt in group.attempts] == list(range(SAMPLES))
                for attempt in group.attempts:
                    rollout, versions = attempt.rollout, versions_of(attempt.rollout)
                    assert rollout.prompt == place and not rollout.stale
                    assert versions == sorted(versions) and versions[0] == rollout.weight_version
                    assert versions[-1] <= iteration and iteration - versions[0] <= staleness
                    ages[iteration - versions[0]] += 1
            seen += [(salt, group.prompt.uid) for group in groups]
        assert pool.metrics()["rollout/groups_under_way"] == 0  # the last iterations start none that would be lost
    assert len(set(seen)) == len(seen) == 5 * batch * total  # the prompts of all draws, each once
    assert len(ages) > 1


def test_a_response_is_that_of_one_request_and_a_groups_seeds_are_those_without_partial_rollouts():
    """Drawn in order, prompt number n belongs to iteration n // batch."""
    pool, order = make_pool(settings(), 10), PromptLoader([Prompt(f"train:{i}", (), [i], "", "") for i in range(50)], 4)
    drawn = [[prompt.uid for prompt in order.next_batch()] for _ in range(10)]
    found = [group for _ in range(10) for group in iterate(pool)]
    assert sorted(group.prompt.uid for group in found) == sorted(uid for batch in drawn for uid in batch)
    for group in found:
        (iteration,) = [number for number, batch in enumerate(drawn) if group.prompt.uid in batch]
        for sample, attempt in enumerate(group.attempts):
            seed = request_seed(0, iteration, group.prompt.uid, sample)
            expected = [(seed + n) % 1000 for n in range(length_of(seed))]
            assert list(attempt.rollout.token_ids) == expected
            assert len(attempt.rollout.logprobs) == len(attempt.rollout.trained) == len(expected)
            # A token has the experts of the version that computed it first, which is when the next one was sampled.
            versions = versions_of(attempt.rollout)
            computed = [versions[0]] * PROMPT + versions[1:]
            experts = attempt.rollout.experts[:, 0, 0].astype(int)
            assert (experts == np.arange(len(experts)) + computed).all()


@pytest.mark.parametrize("prompts", [3, 5])  # fewer than a batch, and an epoch that ends inside one
def test_a_prompt_that_comes_twice_in_a_batch_gets_other_seeds_as_without_partial_rollouts(prompts):
    requests, order = (
        Requests(0, SAMPLES),
        PromptLoader([Prompt(f"train:{i}", (), [i], "", "") for i in range(prompts)], 4),
    )
    batches = [requests(order.next_batch(), iteration, 0) for iteration in range(6)]
    for batch in batches:
        assert len({request.seed for request in batch}) == len(batch)
        assert len({request.group_seed for request in batch}) == 4
    pool, states = make_pool(settings(), 6, prompts=prompts), []
    found = []
    for _ in range(6):
        states.append(json.dumps(pool.state_dict()))
        found.append(facts(iterate(pool)))
    seeds = {request.seed % 1000 for batch in batches for request in batch}
    assert {rollout.token_ids[0] for batch in found for _, rollout, *_ in batch} == seeds
    resumed = make_pool(settings(), 6, prompts=prompts)
    resumed.load_state_dict(json.loads(states[3]))
    resumed.iteration = 3
    assert [facts(iterate(resumed)) for _ in range(3)] == found[3:]


def test_a_resumed_pool_goes_on_as_if_nothing_had_happened():
    straight, states, expected = make_pool(settings(), 12), [], []
    for _ in range(12):
        states.append(json.dumps(straight.state_dict()))
        expected.append(facts(iterate(straight)))
    carried = 0
    for start in (1, 5, 9):
        pool = make_pool(settings(), 12)
        pool.load_state_dict(json.loads(states[start]))
        pool.iteration = start
        assert json.dumps(pool.state_dict()) == states[start]
        carried += len(json.loads(states[start])["under_way"]["groups"])
        for iteration in range(start, 12):
            assert facts(iterate(pool)) == expected[iteration]
    assert carried == 9


def test_the_metrics_say_what_was_carried_and_how_old_it_is():
    pool = make_pool(settings(), 30)
    for iteration in range(20):
        groups = iterate(pool)
        metrics = pool.metrics()
        versions = [versions_of(attempt.rollout) for group in groups for attempt in group.attempts]
        ages = [iteration - one[0] for one in versions]
        tokens = [version for one in versions for version in one]
        assert metrics["rollout/staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        assert metrics["rollout/staleness_max"] == max(ages)
        assert metrics["rollout/older_token_fraction"] == pytest.approx(1 - tokens.count(iteration) / len(tokens))
        assert metrics["rollout/groups_under_way"] == 3 and metrics["rollout/rounds"] >= 0
        saved = json.loads(json.dumps(pool.state_dict()))["under_way"]["groups"]
        rollouts = [r for g in saved for r in [*g["begun"], *(attempt["rollout"] for attempt in g["attempts"])]]
        assert metrics["rollout/carried_tokens"] == sum(count for r in rollouts for _, count in r["versions"]) > 0


def test_a_checkpoint_without_a_pool_starts_one_with_seeds_that_were_not_used():
    pool = make_pool(settings(), 12)
    loader = PromptLoader([Prompt(f"train:{i}", (), [i], "", "exact") for i in range(50)], 4)
    loader.next_batch()
    pool.load_state_dict(loader.state_dict())
    pool.iteration = 1
    groups = iterate(pool)
    seeds = {request_seed(0, iteration, group.prompt.uid, 0) for group in groups for iteration in (1, 2)}
    assert all(group.attempts[0].rollout.token_ids[0] in {seed % 1000 for seed in seeds} for group in groups)


def test_after_a_resume_with_a_lower_bound_what_is_older_is_left_out_of_the_loss():
    pool = make_pool(settings(2, 6, 3), 12)
    for _ in range(4):
        iterate(pool)
    state = json.loads(json.dumps(pool.state_dict()))
    resumed = make_pool(settings(2, 2, 1), 12)
    resumed.load_state_dict(state)
    resumed.iteration = 4
    stale = []
    for iteration in range(4, 12):
        for group in iterate(resumed):
            for attempt in group.attempts:
                assert attempt.rollout.stale == (iteration - attempt.rollout.weight_version > 1)
                stale.append(attempt.rollout.stale)
    assert any(stale) and not all(stale) and not any(stale[-12:])


def test_a_shorter_limit_than_a_response_under_way_is_refused():
    pool = make_pool(settings(), 12)
    iterate(pool)
    state = json.loads(json.dumps(pool.state_dict()))
    shorter = make_pool(settings(longest=9), 12)
    if not any(len(group["begun"]) for group in state["under_way"]["groups"]):
        pytest.fail("nothing is under way: this test shows nothing")
    with pytest.raises(UserError, match="max_response_length = 9: the checkpoint has a response under way of"):
        shorter.load_state_dict(state)


def test_the_newest_publish_of_a_response_is_that_of_its_last_part():
    first = Rollout(0, 0, array("i", [5, 6]), array("f", [-1, -1]), "", "part", 3)
    last = Rollout(0, 0, array("i", [7]), array("f", [-1]), "", "stop", 4)
    assert (first.newest_version, joined(first, last).newest_version, joined(first, last).weight_version) == (3, 4, 3)


def test_parts_whose_experts_nobody_recorded_make_a_response_without_experts():
    """rollout.routing_replay was changed between two starts: `require_experts` then tells the cure."""
    begun, part = (Rollout(0, 0, [1, 2], [-1.0, -1.0], "", "part", version) for version in (0, 1))
    part.experts = np.zeros((6, 1, 1), np.uint8)
    assert joined(begun, part).experts is None and joined(part, begun).experts is None


# ---- with a real engine ----------------------------------------------------------------------------------------------


class Scorer:
    """The length is the reward; it writes down what it was handed while others were being generated."""

    def __init__(self):
        self.heard = []

    def start(self, prompts, *, taught=True):
        self.prompts = prompts
        return lambda rollout: self.heard.append((prompts[rollout.prompt].uid, rollout.sample, rollout.text))

    def finish(self, rollouts):
        groups = [Group(prompt, []) for prompt in self.prompts]
        for rollout in rollouts:
            groups[rollout.prompt].attempts.append(Attempt(rollout, Reward(float(len(rollout.token_ids))), True))
        return groups


def rows():
    return [Prompt(f"train:{i}", (), ids, "", "exact") for i, ids in enumerate([*PROMPTS, *PROMPTS, *PROMPTS])]


def partial_run(engine, tokens, iterations, samples=4):
    """Groups by (iteration that would have drawn them, uid), and what the scorer heard."""
    rollout = RolloutConfig(
        rollout_batch_size=4, partial_groups=3, partial_tokens=tokens, max_staleness=2, n_samples_per_prompt=samples,
        max_response_length=MAX_TOKENS,
    )  # fmt: skip
    requests, scorer = Requests(0, samples), Scorer()
    pool = PartialPool(
        PromptLoader(rows(), 1),
        lambda prompt, at, again: [r.seed for r in requests.of_prompt(prompt, at, 0, 0, again)],
        rollout, total=iterations,
    )  # fmt: skip
    control = SimpleNamespace(share=lambda compute: compute())
    generate = PartialGenerator(engine, scorer, control, SamplingSettings(max_tokens=MAX_TOKENS), tokens, pool)
    timer, found, ages = SimpleNamespace(phase=lambda name: nullcontext()), {}, []
    for iteration in range(iterations):
        engine.weight_version = iteration  # of unchanged weights
        for group in generate(pool.next_batch(), iteration, 0, timer):
            found[group.prompt.uid] = [attempt.rollout for attempt in group.attempts]
        ages.append(pool.metrics()["rollout/staleness_max"])
    return found, ages, scorer.heard


def plain_run(engine, iterations, samples=4):
    generate = GroupGenerator(engine, Scorer(), Requests(0, samples), SamplingSettings(max_tokens=MAX_TOKENS))
    loader, found = PromptLoader(rows(), 4), {}
    for iteration in range(iterations):
        for group in generate(loader.next_batch(), iteration, 0, SimpleNamespace(phase=lambda name: nullcontext())):
            found[group.prompt.uid] = [attempt.rollout for attempt in group.attempts]
    return found


def test_with_unchanged_weights_parts_are_the_tokens_of_an_uninterrupted_response(tmp_path):
    """The prompts are shorter than a cached block and longer, and a part ends at any token."""
    model = make_tiny_model(tmp_path / "model", vocab=VOCAB, initializer_range=0.3)
    with tiny_engine(model) as engine:
        expected = plain_run(engine, 3)
        found, ages, heard = partial_run(engine, 5, 3)
        again, *_ = partial_run(engine, 5, 3)
    assert max(ages) > 0 and found.keys() == expected.keys()
    parts = set()
    for uid, rollouts in found.items():
        for mine, whole, same in zip(rollouts, expected[uid], again[uid], strict=True):
            assert mine.token_ids == whole.token_ids and mine.text == whole.text
            assert mine.finish_reason == whole.finish_reason
            assert mine.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
            assert mine.logprobs == same.logprobs and versions_of(mine) == versions_of(same)  # bit for bit
            parts.add(len(set(versions_of(mine))))
            assert (uid, mine.sample, whole.text) in heard
    assert len(heard) == sum(map(len, found.values())) and parts >= {1, 2}
    reasons = Counter(rollout.finish_reason for rollouts in found.values() for rollout in rollouts)
    assert reasons["stop"] and reasons["length"] and not reasons["part"]


def test_an_engine_in_later_rounds_finds_the_keys_of_earlier_ones(tmp_path):
    model = make_tiny_model(tmp_path / "model", vocab=VOCAB, initializer_range=0.3)
    with tiny_engine(model, max_model_len=200) as engine:
        cached = []
        step = engine._llm.llm_engine.step

        def counting():
            outputs = step()
            cached.extend(output.num_cached_tokens for output in outputs)
            return outputs

        engine._llm.llm_engine.step = counting
        sampling = SamplingSettings(max_tokens=4, ignore_eos=True)
        (begun,) = engine.generate([GenerateRequest(0, 0, LONG, 7, cut=True)], sampling)
        assert begun.finish_reason == "part" and begun.text == ""
        more = GenerateRequest(0, 0, LONG, 7, begun=begun.token_ids, cut=True)
        (kept,) = engine.generate([more], SamplingSettings(max_tokens=4, ignore_eos=True, goes_on=True))
        (dropped,) = engine.generate([more], sampling)
        assert cached == [0, 128, 0]
        assert kept.token_ids == dropped.token_ids
        assert isinstance(kept.token_ids, array)


# ---- the roles of the ranks ------------------------------------------------------------------------------------------


class MadeUpEngine:
    """Writes down what it is asked, and answers it on rank 0 alone."""

    def __init__(self, leads):
        self.leads, self.asked = leads, []

    def generate(self, requests, sampling, on_rollout):
        self.asked.append((requests, sampling))
        parts = [Part(r.prompt, r.sample, r.seed, r.begun) for r in requests]
        return [respond(part, 0) for part in parts] if self.leads else []


def test_the_other_ranks_ask_their_engines_for_the_same_rounds():
    pool, sent = make_pool(settings(), 10), []

    def share(compute):
        sent.append(compute())
        return sent[-1]

    driving, following = MadeUpEngine(True), MadeUpEngine(False)
    sampling, timer = SamplingSettings(max_tokens=LONGEST), SimpleNamespace(phase=lambda name: nullcontext())
    lead = PartialGenerator(driving, Scorer(), SimpleNamespace(share=share), sampling, ROUND, pool)
    control = SimpleNamespace(receive=lambda: sent.pop(0))
    idle = SimpleNamespace(start=lambda prompts: None, finish=lambda rollouts: [])
    follow = PartialFollower(following, idle, control, sampling, ROUND)
    for iteration in range(3):
        prompts = pool.next_batch()
        assert len(lead(prompts, iteration, 0, timer)) == 4
        rounds = [parts for parts in sent if parts]
        assert follow(prompts, iteration, 0, timer) == [] and not sent
        assert len(rounds) == pool.metrics()["rollout/rounds"]
    assert driving.asked == following.asked and len(driving.asked) > 5
    for requests, how in driving.asked:
        assert how.max_tokens == ROUND
        for request in requests:
            left = LONGEST - len(request.begun)
            assert request.max_tokens == min(ROUND, left) and request.cut == (left > ROUND)


def driver(tmp_path, **rollout):
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "1", "kind": "exact"}\n' * 9)
    config = Config(
        model={"path": str(model)}, data={"train": str(tmp_path / "rows.jsonl")},
        run={"output_dir": str(tmp_path / "out")}, rollout={"rollout_batch_size": 2, **rollout},
    )  # fmt: skip
    return Driver(config, splits=("train",))


def test_partial_rollouts_can_be_switched_off_and_on_between_two_starts(tmp_path, capsys):
    def restore(loader, state):
        loader.load_state_dict(state)

    (pool,) = (partial := driver(tmp_path, partial_tokens=8, max_staleness=1))._loaders
    pool.next_batch()
    state = json.loads(json.dumps(pool.state_dict()))
    assert under_way(state) == 3
    partial.restore_data(restore, state)
    assert "warning" not in capsys.readouterr().out
    plain = driver(tmp_path)
    plain.restore_data(restore, state)
    assert "warning: 3 groups were under way when the checkpoint was taken" in capsys.readouterr().out
    (loader,) = plain._loaders
    assert loader.state_dict()["position"] == 3
    partial.restore_data(restore, loader.state_dict())
    assert under_way(pool.state_dict()) == 0 and pool.state_dict()["position"] == 3


def test_an_engine_with_a_generator_per_request_is_refused_and_closed(monkeypatch):
    closed = []
    engine = SimpleNamespace(draws_one_by_one=True, close=lambda: closed.append(True))
    monkeypatch.setattr("megatron_srpo.rollout.ColocatedEngine", lambda **settings: engine)
    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, rollout={"partial_tokens": 8, "max_staleness": 1}
    )  # fmt: skip
    topology = SimpleNamespace(control_group=None, device=SimpleNamespace(type="cuda"))
    with pytest.raises(RolloutError, match=r"rollout\.partial_tokens = 8: vLLM uses its Model Runner V1"):
        build_engine(config, SimpleNamespace(topology=topology), SimpleNamespace())
    assert closed == [True]


def test_the_warning_of_a_mismatch_names_the_age_of_responses_if_they_may_be_old():
    for staleness in (0, 1):
        config = Config(model={"path": "unused"}, data={"train": "unused"}, rollout={"max_staleness": staleness})
        text, is_warning = watches(config)[0].look({"rollout_corr/logprob_diff_mean": 1.0})
        assert is_warning and ("the policy has moved since" in text) == bool(staleness)


def test_the_warning_of_a_mismatch_says_that_it_is_normal_with_partial_rollouts():
    rollout = {"max_staleness": 1, "partial_tokens": 8}
    config = Config(model={"path": "unused"}, data={"train": "unused"}, rollout=rollout)
    text, _ = watches(config)[0].look({"rollout_corr/logprob_diff_mean": 0.06})
    assert "rollout/older_token_fraction), which is normal with rollout.partial_tokens" in text
