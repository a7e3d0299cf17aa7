"""Speculative decoding on a CPU changes neither tokens nor log-probs, and drafts what was said before."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from megatron_srpo.config import RolloutConfig
from megatron_srpo.rollout import GenerateRequest, SamplingSettings, request_seed
from megatron_srpo.rollout.vllm.draft_table import NOTHING, DraftTable
from megatron_srpo.rollout.vllm.settings import ANSWER_DRAFTS, EngineSettings, command_line, engine_arguments
from megatron_srpo.rollout.vllm.speculation import AnswerDrafts, DraftVerifier
from tests.tiny_engines import GREEDY, LONG, VOCAB, largest_error, tiny_engine, tiny_requests, weights
from tests.tiny_models import make_tiny_model
from tests.unit.test_counter_sampler import asked, made_logits, sampler

DRAFTS = 4
SAMPLED = SamplingSettings(max_tokens=40)
SHUFFLED = random.Random(0).sample(tiny_requests(16), 64)
CACHED = [GenerateRequest(4, sample, LONG[:100], request_seed(0, 1, "long", sample)) for sample in range(8)]
CALLS = {
    "sampled": (tiny_requests(16), SAMPLED),
    "few of them in another order": (SHUFFLED[:9], SAMPLED),
    "one of them": (SHUFFLED[5:6], SAMPLED),
    "cold and filtered": (tiny_requests(8), SamplingSettings(temperature=0.7, top_p=0.8, max_tokens=40)),
    "among the likeliest five": (tiny_requests(8), SamplingSettings(temperature=1.3, top_k=5, max_tokens=40)),
    "greedy": (tiny_requests(2), GREEDY),
    "with a cached prefix": (CACHED, SAMPLED),
    "to the last token": (CACHED, SamplingSettings(max_tokens=60, ignore_eos=True)),  # of max_model_len
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [make_tiny_model(tmp_path_factory.mktemp("model"), vocab=VOCAB, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def plain(folders):
    """What an engine without drafts answers, before and after a publish."""
    with tiny_engine(folders[0]) as engine:
        before = {name: engine.generate(*call) for name, call in CALLS.items()}
        engine.publish(iter(weights(folders[1]).items()), 1)
        return before, {name: engine.generate(*call) for name, call in CALLS.items()}


@pytest.fixture(scope="module")
def engine(folders, plain):
    with tiny_engine(folders[0], speculative_tokens=DRAFTS) as engine:
        yield engine


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
        # Matrix products of another batch size may round otherwise.
        torch.testing.assert_close(list(ours.logprobs), list(theirs.logprobs), rtol=0, atol=1e-5)


def counts(rollouts):
    return sum(rollout.drafted for rollout in rollouts), sum(rollout.accepted for rollout in rollouts)


class TestEngine:
    """In this order: the last one publishes."""

    @pytest.mark.parametrize("name", CALLS)
    def test_tokens_and_log_probs_are_those_without_drafts(self, engine, plain, name):
        found = engine.generate(*CALLS[name])
        drafted, accepted = counts(found)
        assert 0 < accepted < drafted, "drafts were accepted, and others refused"
        assert counts(plain[0][name]) == (0, 0)
        check(found, plain[0][name])

    def test_log_probs_are_those_of_transformers(self, engine, folders):
        assert largest_error(folders[0], engine.generate(tiny_requests(), SAMPLED)) < 1e-4

    def test_what_an_earlier_call_has_said_is_drafted(self, engine):
        again = engine.generate(*CALLS["sampled"])
        accepted = counts(again)[1]
        assert accepted > 0.6 * sum(len(rollout.token_ids) for rollout in again)

    def test_nothing_is_drafted_behind_the_longest_response(self, engine):
        asked = [GenerateRequest(0, sample, LONG[:50], sample) for sample in range(4)]
        for tokens, most in ((1, 0), (2, 0), (3, 1)):  # the first token comes from the prompt's step
            for rollout in engine.generate(asked, SamplingSettings(max_tokens=tokens, ignore_eos=True)):
                assert len(rollout.token_ids) == tokens and rollout.drafted <= most

    def test_after_a_publish_tokens_and_log_probs_are_those_of_the_new_weights(self, engine, folders, plain):
        engine.publish(iter(weights(folders[1]).items()), 1)
        for name, call in CALLS.items():
            check(engine.generate(*call), plain[1][name])


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.6, 0, 0.8), (1.5, 7, 1.0), (0.0, 0, 1.0)])
def test_a_step_keeps_what_a_sampler_without_drafts_would_draw_token_by_token(settings):
    temperature, top_k, top_p = settings
    generator = np.random.default_rng(3)
    drafts = [3, 0, 1, 4, 4, 2] * 4
    positions = [int(generator.integers(3, 50)) for _ in drafts]  # of the first new token
    logits = [torch.stack([made_logits(30, 10 * i + j) for j in range(n + 1)]) for i, n in enumerate(drafts)]
    chain = []  # what is drawn, token by token
    for i, n in enumerate(drafts):
        settings = asked([100 + i], [temperature], top_k, top_p)
        outputs = [sampler([positions[i] + j])(logits[i][j : j + 1].clone(), settings) for j in range(n + 1)]
        chain.append([(int(o.sampled_token_ids), float(o.logprobs_tensors.logprobs[0, 0])) for o in outputs])
    proposed = [[token if generator.random() < 0.7 else (token + 1) % 30 for token, _ in drawn[:-1]] for drawn in chain]
    expected = [
        drawn[: 1 + next((j for j, token in enumerate(guess) if token != drawn[j][0]), len(guess))]
        for drawn, guess in zip(chain, proposed, strict=True)
    ]

    ends = np.cumsum(np.array(drafts) + 1)
    metadata = SpecDecodeMetadata.make_dummy(proposed, torch.device("cpu"))
    lengths = torch.tensor([position + n for position, n in zip(positions, drafts, strict=True)], dtype=torch.int32)
    counter = sampler(lengths)
    settings = asked([100 + i for i in range(len(drafts))], [temperature] * len(drafts), top_k, top_p)
    output = DraftVerifier(counter._runner, counter)(metadata, None, torch.cat(logits), settings)
    assert output.sampled_token_ids.shape == (len(drafts), 5) and ends[-1] == len(torch.cat(logits))
    tokens, told = RejectionSampler.parse_output(output.sampled_token_ids, 30, (), output.logprobs_tensors)
    assert tokens == [[token for token, _ in drawn] for drawn in expected]
    flat = torch.tensor([logprob for drawn in expected for _, logprob in drawn])
    torch.testing.assert_close(torch.from_numpy(told.logprobs[:, 0]), flat, rtol=0, atol=2e-6)
    assert told.logprob_token_ids[:, 0].tolist() == [token for drawn in expected for token, _ in drawn]


def learned(table, text, group=0):
    """The table after it has seen a text."""
    wide = np.concatenate([np.full(table.longest, NOTHING), np.array(text)])
    contexts = np.lib.stride_tricks.sliding_window_view(wide, table.longest)[: len(text)]
    table.learn(np.full(len(text), group, np.uint64), contexts, np.array(text, np.int32))
    return table


def drafted(table, context, count=4, group=0):
    wide = np.array([[NOTHING] * (table.longest - len(context)) + context])
    return table.draft(np.array([group], np.uint64), wide, count)[0].tolist()


def test_a_draft_continues_what_followed_last_and_stops_where_nothing_is_known():
    table = learned(DraftTable((2,)), [1, 2, 3, 4, 5])
    assert drafted(table, [2, 3]) == [4, 5, NOTHING, NOTHING]
    assert drafted(table, [7, 8]) == [NOTHING] * 4
    assert drafted(learned(table, [2, 3, 9, 9, 9, 9]), [2, 3]) == [9, 9, 9, 9]


def test_the_longest_n_gram_that_is_known_decides():
    table = learned(learned(DraftTable((3, 2, 1)), [1, 2, 3, 4]), [8, 2, 3, 5])
    assert drafted(table, [1, 2, 3], 1) == [4] and drafted(table, [8, 2, 3], 1) == [5]
    assert drafted(table, [9, 2, 3], 1) == [5]  # seen last


def test_texts_of_another_group_are_unknown_and_rows_do_not_meet():
    table = learned(learned(DraftTable((2,)), [1, 2, 3], group=5), [1, 2, 7], group=6)
    assert drafted(table, [1, 2], 1, group=4) == [NOTHING]
    contexts = np.array([[1, 2]] * 3)
    assert table.draft(np.array([6, 5, 4], np.uint64), contexts, 1)[:, 0].tolist() == [7, 3, NOTHING]


def test_a_full_table_forgets_and_never_mixes_up():
    table = learned(DraftTable((2,), slots=8), list(range(1000)))
    found = [drafted(table, [i, i + 1], 1)[0] for i in range(998)]
    known = [(i, token) for i, token in enumerate(found) if token != NOTHING]
    assert 1 <= len(known) <= 8 and all(token == i + 2 for i, token in known)


def test_drafts_are_forgotten_with_their_request():
    """What is kept of a request is gone one step after it; the table is of fixed size."""
    config = SimpleNamespace(num_speculative_tokens=2, model_config=SimpleNamespace(max_model_len=20))
    proposer = AnswerDrafts(config)
    requests = {name: SimpleNamespace(sampling_params=SimpleNamespace(max_tokens=9)) for name in "abc"}
    batch = SimpleNamespace(req_ids=["a", "b"], num_prompt_tokens=np.array([3, 3]))
    proposer.runner = SimpleNamespace(input_batch=batch, requests=requests)
    tokens = np.zeros((2, 20), np.int32)
    tokens[:, :5] = [[5, 6, 7, 5, 6], [5, 6, 7, 8, 9]]
    assert proposer.propose([[5, 6], [8, 9]], np.array([5, 5]), tokens) == [[7, 8], []]  # a repeats, b went on
    batch.req_ids = ["c"]
    assert proposer.propose([[]], np.array([3]), tokens[:1]) == [[]]
    assert list(proposer._answers) == ["c"]


def test_an_engine_is_started_with_our_drafts_on_a_cpu_and_with_vllms_on_a_gpu(folders):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.import_utils import resolve_obj_by_qualname

    def arguments(tokens, device):
        rollout = RolloutConfig(speculative_tokens=tokens)
        return engine_arguments(EngineSettings(str(folders[0]), str(folders[0]), "bfloat16", rollout, 100, 0, device))

    assert "speculative_config" not in arguments(0, "cpu")
    assert resolve_obj_by_qualname(ANSWER_DRAFTS) is AnswerDrafts
    assert arguments(3, "cpu")["speculative_config"]["model"] == ANSWER_DRAFTS
    made = EngineArgs(**arguments(3, "cuda"))
    assert made.speculative_config == {
        "method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2
    }  # fmt: skip
    assert '--speculative-config={"method": "ngram_gpu", ' in " ".join(command_line(arguments(3, "cuda")))
