"""The LM head joined with its softmax quantities against the plain product: value, gradient, memory, accumulation."""

import pytest
import torch

from megatron_srpo.losses import LinearHead, LogitsHead, linear, vocab_parallel

T, H, V, M = 17, 12, 29, 5


def case(dtype=torch.float64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(T, H, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    ids = torch.randint(0, V, (T, M), generator=g)
    mix = torch.randn(T, M + 1, generator=g, dtype=torch.float64)
    return hidden, weight, ids, mix


def scalar(head, ids, mix):
    logprobs, entropy = head.gather_logprobs(ids)
    return (torch.cat([logprobs, entropy[:, None]], 1) * mix.to(logprobs.dtype)).sum()


@pytest.mark.parametrize("tokens_at_once", [1, 4, T, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradients_equal_the_plain_product(tokens_at_once, temperature, monkeypatch):
    monkeypatch.setattr(vocab_parallel, "CHUNK_BYTES", {"cpu": 3 * V * 4})  # temporaries of three tokens
    hidden, weight, ids, mix = case()
    plain = scalar(LogitsHead(hidden @ weight.T / temperature), ids, mix)
    expected = torch.autograd.grad(plain, [hidden, weight])
    head = LinearHead(hidden, weight, V, temperature=temperature, budget_bytes=tokens_at_once * V * 8)
    value = scalar(head, ids, mix)
    found = torch.autograd.grad(value, [hidden, weight])
    torch.testing.assert_close(value, plain, rtol=0, atol=1e-11)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    torch.testing.assert_close(head.logits(), hidden @ weight.T)
    assert torch.equal(head.topk(7), LogitsHead(hidden @ weight.T).topk(7))


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])  # uniform, ordinary, one-hot
def test_gradcheck(scale):
    hidden, weight, ids, _ = case(scale=scale)
    hidden, weight, ids = hidden[:3].detach().requires_grad_(), weight.detach().requires_grad_(), ids[:3]

    def in_pieces(hidden, weight):  # gradcheck runs the backward again and again, which the in-place form refuses
        return LinearHead(hidden, weight, V, budget_bytes=1).gather_logprobs(ids)

    assert torch.autograd.gradcheck(in_pieces, [hidden, weight], atol=1e-6)


def test_a_second_backward_over_logits_that_became_their_gradient_is_refused():
    hidden, weight, ids, mix = case()
    value = scalar(LinearHead(hidden, weight, V), ids, mix)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("tokens_at_once", [3, T])
def test_the_weights_gradient_accumulates_in_fp32_where_megatron_keeps_it(tokens_at_once):
    hidden, weight, ids, mix = case(torch.bfloat16)
    plain = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(scalar(LogitsHead(plain[0] @ plain[1].T), ids, mix), plain)
    weight.main_grad = torch.ones(V, H)  # fp32, with something in it already
    for _ in range(2):
        scalar(LinearHead(hidden, weight, V, budget_bytes=tokens_at_once * V * 2), ids, mix).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double() - 1, 2 * expected[1], rtol=0.03, atol=0.15)
    torch.testing.assert_close(hidden.grad.double(), 2 * expected[0], rtol=0.03, atol=0.3)


def test_without_use_of_the_entropy_no_gradient_flows_into_it():
    hidden, weight, ids, _ = case()
    logprobs, entropy = LinearHead(hidden, weight, V).gather_logprobs(ids)
    assert entropy.requires_grad and (logprobs.sum() + entropy.detach().sum()).requires_grad
    found = torch.autograd.grad(logprobs.sum(), hidden)[0]
    plain = torch.autograd.grad((hidden @ weight.T).log_softmax(-1).gather(1, ids).sum(), hidden)[0]
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(("budget", "copies"), [(2**30, 1), (64 * 2000 * 2, 0)])
def test_nothing_as_large_as_the_logits_is_saved_beyond_the_logits_themselves(budget, copies):
    tokens, width, size = 256, 2000, 16
    hidden = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(width, size, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        LinearHead(hidden, weight, width, budget_bytes=budget).gather_logprobs(torch.zeros(tokens, 3, dtype=torch.long))
    given = (tokens + width) * size * 2
    assert sum(saved) - given - copies * tokens * width * 2 <= tokens * (3 * (9 + 4) + 8)


def test_scoring_keeps_no_logits():
    hidden, weight, ids, _ = case()
    with torch.no_grad():
        logprobs, entropy = LinearHead(hidden, weight, V).gather_logprobs(ids)
    assert logprobs.grad_fn is None and entropy.grad_fn is None


def test_more_candidates_than_the_vocabulary_has_are_refused():
    with pytest.raises(ValueError, match="lower distillation_topk"):
        vocab_parallel.topk(torch.randn(2, 3), 4, vocab_start=0, group=None)
    assert vocab_parallel.topk(torch.tensor([[0.5, 2.0, 1.0]]), 3, vocab_start=0, group=None).tolist() == [[1, 2, 0]]
    assert vocab_parallel.topk(torch.tensor([[1.0, 2.0, 1.0]]), 3, vocab_start=0, group=None).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("tokens_at_once", [1, 4, 1000])
@pytest.mark.parametrize("at", [[0], [3, 4, 9, 16], list(range(T))])
def test_the_head_finds_the_top_k_ids_itself(tokens_at_once, at, monkeypatch):
    monkeypatch.setattr(vocab_parallel, "CHUNK_BYTES", {"cpu": 3 * V * 4})
    hidden, weight, ids, _ = case()
    ids, at, k = ids[:, :1], torch.tensor(at), 6
    mix = torch.randn(T, 1 + k + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = (hidden @ weight.T / 0.6).log_softmax(-1)
    top = plain.topk(k, 1).indices
    elsewhere = torch.ones(T, dtype=torch.bool).index_fill(0, at, False)
    top[elsewhere] = ids[elsewhere]
    entropy = -(plain.exp() * plain).sum(-1, keepdim=True)
    expected = torch.cat([plain.gather(1, torch.cat([ids, top], 1)), entropy], 1)
    head = LinearHead(hidden, weight, V, temperature=0.6, budget_bytes=tokens_at_once * V * 8)
    for one in (head, LogitsHead(hidden @ weight.T, temperature=0.6)):
        logprobs, entropy, found = one.gather_topk(ids, k, at)
        assert found.equal(top) and not found.requires_grad
        value = torch.cat([logprobs, entropy[:, None]], 1)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)
        gradients = torch.autograd.grad((value * mix).sum(), [hidden, weight])
        for mine, theirs in zip(
            gradients, torch.autograd.grad((expected * mix).sum(), [hidden, weight], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("at", "largest"), [(range(0, T, 2), 3), (range(T), T)])
def test_the_distilled_rows_of_the_logits_are_not_copied_all_at_once(at, largest, monkeypatch):
    monkeypatch.setattr(vocab_parallel, "CHUNK_BYTES", {"cpu": 3 * V * 4})
    sizes, candidates = [], linear.local_candidates
    monkeypatch.setattr(
        linear, "local_candidates", lambda rows, *given: sizes.append(len(rows)) or candidates(rows, *given)
    )
    hidden, weight, ids, _ = case()
    LinearHead(hidden, weight, V).gather_topk(ids[:, :1], 6, torch.tensor(at))
    assert sum(sizes) == len(at) and max(sizes) == largest


@pytest.mark.parametrize("rows", [0, 1000])  # rows of the weight are fetched; all products are made
def test_log_probs_at_ids_from_a_known_normaliser(rows, monkeypatch):
    monkeypatch.setattr(linear, "FETCHED_ROW", rows)
    monkeypatch.setattr(linear, "PRODUCT_BYTES", 3 * V * 8)  # a few tokens at a time
    hidden, weight, ids, _ = case()
    head = LinearHead(hidden, weight, V, temperature=0.6)
    expected, _, normaliser = head.gather_statistics(ids)
    assert not normaliser.requires_grad
    torch.testing.assert_close(normaliser, (hidden @ weight.T / 0.6).logsumexp(-1))
    found = head.logprobs_at(ids, normaliser)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
