"""What an engine promises of its rollouts, on a real vLLM engine in this process."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_srpo.config import RolloutConfig
from megatron_srpo.rollout import GenerateRequest, RolloutError, SamplingSettings, request_seed
from megatron_srpo.rollout.engine import decode_inside
from megatron_srpo.rollout.vllm.settings import check_model
from tests.sampling_reference import chi_square, kept
from tests.tiny_engines import (
    EOS,
    GREEDY,
    LONG,
    MAX_TOKENS,
    PROMPTS,
    SAMPLED,
    VOCAB,
    largest_error,
    tiny_engine,
    tiny_requests,
    weights,
)
from tests.tiny_models import make_tiny_model, tiny_tokenizer

MAX_MODEL_LEN = 160
STEP = 320  # tokens of one step of the engine: all short prompts at once, not all long ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab=VOCAB)


@pytest.fixture(scope="module")
def engine(folder):
    with tiny_engine(folder, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=STEP) as engine:
        yield engine


@pytest.fixture(scope="module")
def rollouts(engine):
    return engine.generate(tiny_requests(16), SAMPLED)


def tokens(rollouts):
    return {(rollout.prompt, rollout.sample): rollout.token_ids for rollout in rollouts}


def test_every_request_is_answered_once_and_in_order_whatever_order_they_come_in(engine, rollouts):
    places = [(request.prompt, request.sample) for request in tiny_requests(16)]
    assert [(rollout.prompt, rollout.sample) for rollout in rollouts] == places
    shuffled = random.Random(0).sample(tiny_requests(16), len(places))
    assert [(rollout.prompt, rollout.sample) for rollout in engine.generate(shuffled, SAMPLED)] == places


def test_a_response_is_handed_over_once_when_it_is_complete_and_the_others_are_not(engine, rollouts):
    heard, unfinished = [], []

    def on_rollout(rollout):
        heard.append(rollout)
        unfinished.append(engine._llm.llm_engine.has_unfinished_requests())

    assert engine.generate(tiny_requests(16), SAMPLED, on_rollout) == rollouts
    assert sorted(heard, key=lambda rollout: (rollout.prompt, rollout.sample)) == rollouts
    lengths = [len(rollout.token_ids) for rollout in heard]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # all start in the first step: the shortest is first
    assert unfinished[0]


def test_samples_of_one_prompt_differ(rollouts):
    for prompt in range(len(PROMPTS)):
        assert len({tuple(rollout.token_ids) for rollout in rollouts if rollout.prompt == prompt}) > 8


def test_a_response_ends_with_its_end_token_or_at_full_length(rollouts):
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        if rollout.finish_reason == "stop":
            assert rollout.token_ids.index(EOS) == len(rollout.token_ids) - 1
        else:
            assert len(rollout.token_ids) == MAX_TOKENS and EOS not in rollout.token_ids
    assert any(len(rollout.token_ids) < MAX_TOKENS for rollout in rollouts)


def test_every_token_has_a_log_prob_and_the_text_is_without_special_tokens(rollouts):
    tokenizer = tiny_tokenizer(VOCAB)
    for rollout in rollouts:
        assert len(rollout.logprobs) == len(rollout.token_ids) > 0
        assert all(type(token) is int for token in rollout.token_ids)
        assert all(type(logprob) is float and logprob < 0 for logprob in rollout.logprobs)
        assert rollout.text == tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True)
        assert "<" not in rollout.text


def test_a_token_id_outside_the_models_vocabulary_ends_the_call_with_a_message(engine, monkeypatch):
    monkeypatch.setattr(engine, "_decode", partial(decode_inside, 3, str))  # as if the model had three tokens
    with pytest.raises(RolloutError, match=r"sample 0 cannot be used: token id \d+ is outside the vocabulary"):
        engine.generate(tiny_requests(1)[:1], SAMPLED)


def test_end_tokens_can_be_ignored(engine):
    settings = SamplingSettings(max_tokens=40, ignore_eos=True)
    long = engine.generate(tiny_requests(4), settings)
    assert {(len(rollout.token_ids), rollout.finish_reason) for rollout in long} == {(40, "length")}
    assert any(EOS in rollout.token_ids for rollout in long)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_are_those_of_transformers_at_the_sampling_temperature(engine, folder, temperature):
    settings = SamplingSettings(temperature=temperature, max_tokens=MAX_TOKENS)
    assert largest_error(folder, engine.generate(tiny_requests(), settings), temperature) < 1e-4


def test_greedy_responses_take_the_likeliest_token_and_need_no_seed(engine, folder):
    greedy = engine.generate(tiny_requests(3), GREEDY)
    assert all(rollout.token_ids == greedy[3 * rollout.prompt].token_ids for rollout in greedy)
    assert largest_error(folder, greedy) < 1e-4
    sampled = engine.generate(tiny_requests(3), SAMPLED)
    assert all(a.logprobs[0] >= b.logprobs[0] for a, b in zip(greedy, sampled, strict=True))


def test_the_same_seeds_give_the_same_responses_and_log_probs(engine, rollouts):
    assert engine.generate(tiny_requests(16), SAMPLED) == rollouts


def test_no_call_meets_what_an_earlier_one_left_in_the_prefix_cache(engine, monkeypatch):
    """It would change roundings, and a resumed run, which has no earlier call, could not repeat the responses."""
    cached, rollout = [], engine._rollout

    def record(request, output, sampling):
        cached.append((request.sample, output.num_cached_tokens))
        return rollout(request, output, sampling)

    monkeypatch.setattr(engine, "_rollout", record)
    asked = [GenerateRequest(0, sample, LONG, seed=sample) for sample in range(3)]
    first = engine.generate(asked, SAMPLED)
    assert engine.generate(asked, SAMPLED) == first
    # Within a call, the samples of a prompt share it.
    assert sorted(cached[:3]) == sorted(cached[3:]) == [(0, 0), (1, 128), (2, 128)]


@pytest.mark.parametrize("changed", [{"iteration": 2}, {"run_seed": 1}])
def test_another_iteration_or_run_seed_gives_other_responses(engine, rollouts, changed):
    before, after = tokens(rollouts), tokens(engine.generate(tiny_requests(16, **changed), SAMPLED))
    same = [place for place in before if before[place] == after[place]]
    assert len(same) < len(before) / 4  # very short responses may coincide


def test_a_seed_gives_the_same_response_whatever_else_is_in_the_batch(engine, rollouts):
    asked = tiny_requests(16)
    everything = {(rollout.prompt, rollout.sample): rollout for rollout in rollouts}
    shuffled = random.Random(1).sample(asked, len(asked))
    for some in (asked[::-1], shuffled, shuffled[:7], asked[5:6]):
        for rollout in engine.generate(some, SAMPLED):
            before = everything[rollout.prompt, rollout.sample]
            assert rollout.token_ids == before.token_ids
            # Matrix products of another batch size may round otherwise.
            torch.testing.assert_close(rollout.logprobs, before.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.7, 5, 1.0), (0.8, 0, 0.7)])
def test_first_tokens_have_the_distribution_of_transformers_filtered(engine, folder, temperature, top_k, top_p):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        probs = kept(model(torch.tensor([PROMPTS[0]])).logits[0, -1], temperature, top_k, top_p)
    asked = [GenerateRequest(0, sample, PROMPTS[0], request_seed(5, 1, "p", sample)) for sample in range(2000)]
    sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=1)
    found = engine.generate(asked, sampling)
    counts = torch.bincount(torch.tensor([rollout.token_ids[0] for rollout in found]), minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    assert abs(chi_square(counts, probs)) < 4
    logprobs = torch.tensor([rollout.logprobs[0] for rollout in found])
    expected = probs[[rollout.token_ids[0] for rollout in found]].log().float()
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def test_prompts_that_do_not_fit_into_one_step_of_the_engine_are_answered_as_if_they_were_alone(engine):
    """vLLM would cut the last prompt of a step into parts, and then fail on a CPU's generator."""
    asked = [
        GenerateRequest(prompt, 0, LONG[prompt : prompt + 60], request_seed(0, 1, str(prompt), 0))
        for prompt in range(12)
    ]
    assert sum(len(request.token_ids) for request in asked) > 2 * STEP
    together = engine.generate(asked, SAMPLED)
    assert tokens(together) == {
        key: ids for one in asked for key, ids in tokens(engine.generate([one], SAMPLED)).items()
    }


def test_a_step_that_is_too_small_for_a_prompt_on_a_cpu_is_refused(folder):
    def check(tokens, device="cpu"):
        rollout = RolloutConfig(max_num_seqs=64, max_num_batched_tokens=tokens)
        check_model(folder, rollout, MAX_MODEL_LEN, device)

    check(0)
    check(MAX_MODEL_LEN)
    check(MAX_MODEL_LEN - 1, "cuda")
    with pytest.raises(RolloutError, match=f"max_num_batched_tokens = 159: .* expected 0 or .* = {MAX_MODEL_LEN}. "):
        check(MAX_MODEL_LEN - 1)


def test_seeds_use_all_63_bits_and_depend_on_every_part():
    seeds = {
        request_seed(run, iteration, uid, sample)
        for run in (0, 1) for iteration in (-1, 0, 1, 11) for uid in ("", "1", "a/1") for sample in (0, 1, 11)
    }  # fmt: skip
    assert len(seeds) == 2 * 4 * 3 * 3
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    # Frozen: a resumed run, on another machine too, must draw the same responses.
    assert request_seed(3, 7, "gsm8k/12", 5) == 1631606856884967964


def test_the_largest_seed_is_accepted(engine):
    (rollout,) = engine.generate([GenerateRequest(0, 0, PROMPTS[0], seed=2**63 - 1)], SAMPLED)
    assert rollout.token_ids


def test_nothing_asked_is_nothing_answered(engine):
    assert engine.generate([], SAMPLED) == []


@pytest.mark.parametrize("length", [0, MAX_MODEL_LEN - MAX_TOKENS + 1, 200])
def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs(engine, length):
    asked = [*tiny_requests(1), GenerateRequest(9, 0, [3] * length, 0)]
    with pytest.raises(RolloutError, match=rf"prompt 9 has {length} tokens: expected 1 to 148, .*max_prompt_length"):
        engine.generate(asked, SAMPLED)


def test_the_longest_prompt_is_answered_in_full(engine):
    (rollout,) = engine.generate(
        [GenerateRequest(0, 0, [3] * (MAX_MODEL_LEN - MAX_TOKENS), 0)],
        SamplingSettings(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    assert len(rollout.token_ids) == MAX_TOKENS


def test_generating_leaves_the_trainers_random_state_alone(engine):
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(3).tolist()
    random.seed(5)
    torch.manual_seed(5)
    engine.generate(tiny_requests(2), SAMPLED)
    assert (random.random(), torch.rand(3).tolist()) == expected


def test_rollouts_carry_the_version_of_the_last_publish(engine, folder, rollouts):
    assert {rollout.weight_version for rollout in rollouts} == {0}
    engine.publish(iter(weights(folder).items()), 7)
    after = engine.generate(tiny_requests(1), SAMPLED)
    assert {rollout.weight_version for rollout in after} == {engine.weight_version} == {7}


def test_vllms_older_runner_is_noticed_on_a_gpu_alone(engine, monkeypatch):
    assert not engine.draws_one_by_one
    monkeypatch.setattr(engine, "_device", "cuda")  # the engine itself stays what it is, one with runner V1
    assert engine.draws_one_by_one


def test_sleeping_is_nothing_on_a_cpu(engine):
    engine.sleep()
    assert engine.generate(tiny_requests(1), SAMPLED)


def test_a_publish_wakes_the_weights_and_generating_the_rest(engine, folder, monkeypatch):
    """The order alone: vLLM frees memory on GPUs only."""
    did = []
    monkeypatch.setattr(engine, "_device", "cuda")
    monkeypatch.setattr(engine._llm, "sleep", lambda level: did.append(f"sleep {level}"))
    monkeypatch.setattr(engine._llm, "wake_up", lambda tags: did.append(tags))
    monkeypatch.setattr(engine, "_run", lambda *_: did.append("generate") or [])
    engine.sleep()
    engine.sleep()
    engine.publish(iter(weights(folder).items()), 8)
    engine.generate(tiny_requests(1), SAMPLED)
    engine.publish(iter(weights(folder).items()), 9)
    engine.sleep()
    engine.generate(tiny_requests(1), SAMPLED)
    assert did == ["sleep 1", ["weights"], ["kv_cache"], "generate", "sleep 1", ["weights", "kv_cache"], "generate"]


def test_an_engine_drops_weights_that_the_next_publish_replaces_and_generates_nothing_before(
    engine, folder, monkeypatch
):
    did = []
    monkeypatch.setattr(engine, "_device", "cuda")
    monkeypatch.setattr(engine._llm, "sleep", lambda level: did.append(f"sleep {level}"))
    monkeypatch.setattr(engine._llm, "wake_up", lambda tags: did.append(tags))
    monkeypatch.setattr(engine, "_run", lambda *_: did.append("generate") or [])
    engine.sleep(publish_next=True)
    with pytest.raises(RuntimeError, match="has dropped its weights"):
        engine.generate(tiny_requests(1), SAMPLED)
    engine.publish(iter(weights(folder).items()), 10)
    engine.generate(tiny_requests(1), SAMPLED)
    assert did == ["sleep 2", ["weights"], ["kv_cache"], "generate"]


def test_a_second_engine_in_the_same_process_is_refused(engine, folder):
    with (
        pytest.raises(RolloutError, match=r"RANK is not set.*another engine open in this process"),
        tiny_engine(folder),
    ):
        pass
    assert engine.generate(tiny_requests(1), SAMPLED)
