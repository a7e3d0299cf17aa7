"""Comparing traces: the worst token, and the first layer that differs."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_srpo import data
from megatron_srpo.commands.compare_logits import _tokens
from megatron_srpo.comparison.trace import EMBEDDING, HEAD, Trace, compare


def trace(layers: int = 3, tokens: int = 5, vocab: int = 7) -> Trace:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(tokens, 4, generator=generator) for _ in range(layers + 1)]
    return Trace(hidden, torch.randn(tokens, vocab, generator=generator).log_softmax(-1))


def test_equal_traces_do_not_differ_anywhere():
    found = compare(trace(), trace(), [0.0] * 4)
    assert found.worst == 0 and found.where == HEAD and found.by_layer == [0, 0, 0, 0]


def test_the_worst_token_and_the_first_layer_are_named():
    other = trace()
    other.logprobs[2, 6] -= 0.5
    other.logprobs[4, 1] += 0.25
    for layer in (2, 3):  # layers 1 and 2: after the embedding they count from 0
        other.hidden[layer][1, 1] += 0.1
    found = compare(trace(), other, [1e-3] * 4)
    assert (found.position, found.token, found.where) == (2, 6, "layer 1")
    assert abs(found.worst - 0.5) < 1e-6 and abs(found.ours - found.theirs - 0.5) < 1e-6


def test_a_fault_before_the_first_layer_and_one_after_the_last_are_told_apart():
    early, late = trace(), trace()
    early.hidden[0] += 1
    late.logprobs += 1
    assert compare(trace(), early, [1e-3] * 4).where == EMBEDDING
    assert compare(trace(), late, [1e-3] * 4).where == HEAD


def test_blank_lines_of_a_file_of_prompts_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"vocab_size": 200}')
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    tokenizer = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
    monkeypatch.setattr(data, "tokenizer_from", lambda folder: tokenizer)
    assert _tokens(tmp_path, [], tmp_path / "prompts.txt", [])[0] == [[97], [98]]


def test_nan_is_the_worst_of_all():
    other = trace()
    other.logprobs[3, 0] = float("nan")
    other.hidden[2][0, 0] = float("nan")
    found = compare(trace(), other, [1e-3] * 4)
    assert found.worst == float("inf") and (found.position, found.token, found.where) == (3, 0, "layer 1")


def test_a_trace_that_knows_a_few_log_probs_is_compared_on_those():
    reference = trace()
    ids = torch.tensor([[1, 2], [0, 6], [3, -1], [5, 4], [2, 0]])
    known = Trace(reference.hidden, reference.at(ids), ids)
    known.logprobs[2, 1] = 99.0  # nothing is known there
    assert compare(reference, known, [0.0] * 4).worst == 0
    known.logprobs[3, 0] += 2
    found = compare(reference, known, [0.0] * 4)
    assert (found.position, found.token) == (3, 5) and abs(found.worst - 2) < 1e-6
