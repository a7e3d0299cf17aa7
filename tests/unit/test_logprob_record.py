"""Log-probs that the sampler of an engine in this process keeps until a request is complete."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_srpo.rollout import GenerateRequest, SamplingSettings, prepare_environment, request_seed
from tests.tiny_engines import VOCAB, tiny_engine
from tests.tiny_models import make_tiny_model

prepare_environment("cpu")

from megatron_srpo.rollout.vllm.counter_sampler import LogprobRecord  # noqa: E402


@pytest.mark.parametrize("speculative_tokens", [0, 3])
def test_log_probs_that_the_sampler_keeps_are_those_that_vllm_hands_over(tmp_path, speculative_tokens):
    """Also if a cache of a few blocks makes running requests give theirs up, so that vLLM computes tokens again."""
    prompts = [[3 + (7 * i * k + i) % 17 for i in range(60)] for k in range(1, 9)]
    requests = [
        GenerateRequest(p, s, ids, request_seed(0, 0, str(p), s)) for p, ids in enumerate(prompts) for s in (0, 1)
    ]
    asked = SamplingSettings(max_tokens=80, ignore_eos=True)
    folder = make_tiny_model(tmp_path, vocab=VOCAB)
    with tiny_engine(
        folder, max_model_len=160, cpu_kv_cache_gib=0.0004, max_num_seqs=12, speculative_tokens=speculative_tokens
    ) as engine:
        scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
        preempted, preempt = [], scheduler._preempt_request
        scheduler._preempt_request = lambda request, *more, **how: (
            preempted.append(request) or preempt(request, *more, **how)
        )
        kept = engine.generate(requests, asked)
        assert preempted and not engine._record._row_of, "some were preempted, and all are forgotten"
        engine._record = None  # vLLM is asked for log-probs
        handed_over = engine.generate(requests, asked)
    assert [rollout.token_ids for rollout in kept] == [rollout.token_ids for rollout in handed_over]
    if not speculative_tokens:  # what was drafted decides on the batches, and these on roundings
        assert [rollout.logprobs for rollout in kept] == [rollout.logprobs for rollout in handed_over]
    for one, other in zip(kept, handed_over, strict=True):
        torch.testing.assert_close(list(one.logprobs), list(other.logprobs), rtol=0, atol=1e-5)


def test_the_record_keeps_each_requests_log_probs_while_requests_come_wait_and_leave():
    """Requests of random lengths in a batch whose order changes, with drafts that are sampled again."""
    random = np.random.default_rng(0)
    record, expected, lengths = LogprobRecord(2, 64), {}, {}
    for step in range(600):
        if random.random() < 0.6:
            name = str(step)
            lengths[name], expected[name] = int(random.integers(1, 8)), []
        names = [name for name in random.permutation(list(lengths)) if random.random() < 0.8]
        drafts = random.integers(0, 4, len(names))
        request = np.repeat(np.arange(len(names)), drafts + 1)
        starts = [lengths[name] + len(expected[name]) for name in names]
        positions = np.concatenate([np.arange(s, s + n + 1) for s, n in zip(starts, drafts, strict=True)] or [[]])
        logprobs = -random.random(len(request)).astype(np.float32)
        if len(names):
            record.add(names, positions.astype(np.int64), logprobs, request)
        for row, name in enumerate(names):
            expected[name] += logprobs[request == row][: random.integers(1, drafts[row] + 2)].tolist()
        for name in [name for name in lengths if len(expected[name]) > 40 - lengths[name]]:
            assert record.take(name, lengths.pop(name), len(told := expected.pop(name))).tolist() == told
    assert len(record._values) <= 64, "rows are used again"
    with pytest.raises(KeyError):
        record.take("0", 0, 1)
