"""The objective with the vocabulary on two gloo ranks of unequal width equals the plain reference."""

import torch
import torch.distributed as dist

from megatron_srpo.losses import (
    LinearHead,
    LogitsHead,
    RoutedLoss,
    full_divergence,
    gather_logprobs,
    topk,
)
from tests.distributed_harness import run_distributed
from tests.losses_reference import objective, random_row
from tests.losses_reference import settings as settings_of

VOCAB, SPLIT = 13, 8  # rank 0 has 8 columns, rank 1 has 5


def _shard():
    return slice(0, SPLIT) if dist.get_rank() == 0 else slice(SPLIT, VOCAB)


def _objective_on_ranks():
    group, cut = dist.group.WORLD, _shard()
    for settings, row in (
        (settings_of(), {}),
        (settings_of(divergence_alpha=1.0, kl_loss_coef=0.2, entropy_coef=0.1), {"old": True}),
        (settings_of(divergence_alpha=0.25), {"full": True}),
    ):
        logits, teacher, batch, sequences = random_row(
            5, VOCAB, k=10, kl=settings.kl_loss_coef, entropy=settings.entropy_coef, **row
        )  # k is wider than rank 1's shard
        logits.requires_grad_()
        expected = objective(logits, teacher, batch, settings, 9, 0.4, sequences)
        (expected_gradient,) = torch.autograd.grad(expected, logits)
        if batch.scores.topk_ids is not None:
            assert torch.equal(
                topk(logits.detach()[:, cut], 10, vocab_start=cut.start, group=group), batch.scores.topk_ids
            )
        else:
            batch.scores.teacher_logits = teacher[:, cut]
        mine = logits.detach()[:, cut].clone().requires_grad_()
        loss, _ = RoutedLoss(settings)(
            LogitsHead(mine, cut.start, group), batch, loss_tokens=9, distill_weight_mean=0.4
        )
        (gradient,) = torch.autograd.grad(loss, mine)
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient[:, cut], rtol=0, atol=1e-10)


def test_two_ranks_equal_the_reference_in_value_and_gradient():
    run_distributed(_objective_on_ranks, 2)


def _linear_head_on_ranks():
    """The head's product included, whole and in pieces: hidden and weight gradients of the serial reference."""
    group, cut = dist.group.WORLD, _shard()
    width, padding = cut.stop - cut.start, 3  # rank 1's weight has rows that are no vocabulary
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(14, 6, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCAB, 6, generator=g, dtype=torch.float64)
    _, teacher, batch, sequences = random_row(5, VOCAB, k=10, old=True, kl=0.2, entropy=0.1)
    settings = settings_of(entropy_coef=0.1, kl_loss_coef=0.2)
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = objective(plain[0] @ plain[1].T / 0.7, teacher, batch, settings, 9, 0.4, sequences)
    gradients = torch.autograd.grad(expected, plain)
    for budget in (2**20, 5 * 8 * SPLIT):  # everything at once; five tokens of rank 0 at once
        mine = hidden.clone().requires_grad_()
        shard = torch.cat([weight[cut], torch.full((padding, 6), 1e6, dtype=torch.float64)]).requires_grad_()
        head = LinearHead(mine, shard, width, cut.start, group, 0.7, budget)
        loss, _ = RoutedLoss(settings)(head, batch, loss_tokens=9, distill_weight_mean=0.4)
        grad_hidden, grad_weight = torch.autograd.grad(loss, [mine, shard])
        dist.all_reduce(grad_hidden)  # the caller's graph does it
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(grad_hidden, gradients[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(grad_weight[:width], gradients[1][cut], rtol=0, atol=1e-10)
        assert torch.equal(grad_weight[width:], torch.zeros_like(grad_weight[width:]))
        assert torch.equal(head.topk(10), LogitsHead(mine.detach() @ shard[:width].T, cut.start, group).topk(10))


def test_the_head_joined_with_the_loss_equals_the_reference_on_two_ranks():
    run_distributed(_linear_head_on_ranks, 2)


def _a_rank_without_columns():
    """Its maximum is none, not 0: the others' mass would underflow beside it."""
    rank, group = dist.get_rank(), dist.group.WORLD
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) - 300
    ids = torch.tensor([[0, 5]] * 5)
    mine = logits[:, :0] if rank == 0 else logits
    logp, entropy = gather_logprobs(mine, ids, vocab_start=0, group=group)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), exact[:, [0, 5]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-5)
    other = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) - 300
    found = full_divergence(mine, other[:, : mine.size(1)], 0.5, group=group)
    expected = full_divergence(logits.double(), other.double(), 0.5, group=None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(topk(mine, 3, vocab_start=0, group=group), topk(logits, 3, vocab_start=0, group=None))
    start, ids = 2 * rank, ids + 2  # rank 0 has two columns, of which no token is possible
    mine = torch.full((5, 2), -torch.inf) if rank == 0 else logits
    logp, entropy = gather_logprobs(mine, ids, vocab_start=start, group=group)
    torch.testing.assert_close(logp.double(), exact[:, [0, 5]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-5)
    found = full_divergence(mine, mine if rank == 0 else other, 0.5, group=group)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_rank_without_a_column_of_the_vocabulary():
    run_distributed(_a_rank_without_columns, 2)


def _count_collectives():
    calls = []

    def counted(name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            sent = args[1] if name == "all_gather" else args[0]
            calls.append((name, sent.numel() * sent.element_size()))
            return original(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather"):
        setattr(dist, name, counted(name))
    cut = _shard()
    logits, teacher, _, _ = random_row(1, VOCAB, k=3)
    mine = logits[:, cut].clone().requires_grad_()
    found = {}

    def measure(label, run):
        calls.clear()
        result = run()
        found[label] = list(calls)
        return result

    ids = torch.zeros(mine.size(0), 4, dtype=torch.long)
    logp, entropy = measure(
        "forward", lambda: gather_logprobs(mine, ids, vocab_start=cut.start, group=dist.group.WORLD)
    )
    measure("backward", lambda: (logp.sum() + entropy.sum()).backward())
    measure("topk", lambda: topk(mine.detach(), 3, vocab_start=cut.start, group=dist.group.WORLD))
    hidden, weight = torch.randn(mine.size(0), 6, requires_grad=True), torch.randn(mine.size(1), 6, requires_grad=True)
    for label, budget in (("linear", 2**20), ("linear in pieces", 1)):
        head = LinearHead(hidden, weight, mine.size(1), cut.start, dist.group.WORLD, 1.0, budget)
        logp, entropy = measure(label, lambda head=head: head.gather_logprobs(ids))
        measure(f"{label} backward", lambda pair=(logp, entropy): (pair[0].sum() + pair[1].sum()).backward())
    for label, row in (("loss, top-k", {"k": 3}), ("loss, full", {"k": 3, "full": True})):
        full, teacher, batch, _ = random_row(1, VOCAB, entropy=0.1, **row)
        if batch.scores.teacher_logits is not None:
            batch.scores.teacher_logits = teacher[:, cut]
        head = LogitsHead(full[:, cut].clone().requires_grad_(), cut.start, dist.group.WORLD)
        loss, _ = measure(
            label,
            lambda head=head, batch=batch: RoutedLoss(settings_of(entropy_coef=0.1))(
                head, batch, loss_tokens=9, distill_weight_mean=0.4
            ),
        )
        measure(f"{label} backward", lambda loss=loss: loss.backward())
    value = measure("full", lambda: full_divergence(mine, teacher[:, cut], 0.5, group=dist.group.WORLD))
    measure("full backward", lambda: value.sum().backward())
    return found


def test_logprob_and_entropy_take_two_collectives_and_backward_none():
    for found in run_distributed(_count_collectives, 2):
        tokens, ids, k = 14, 4, 3
        assert found["forward"] == [("all_reduce", tokens * 8), ("all_reduce", tokens * (2 + ids) * 8)]  # float64
        assert found["linear"] == [("all_reduce", tokens * 4), ("all_reduce", tokens * (2 + ids) * 4)]  # float32
        assert found["linear in pieces"] == found["linear"]
        assert found["backward"] == found["linear backward"] == found["linear in pieces backward"] == []
        assert found["topk"] == [("all_gather", tokens * k * 2 * 8)]
        full = [("all_reduce", 2 * tokens * 8), ("all_reduce", 2 * tokens * 8), ("all_reduce", tokens * 2 * 8)]
        assert found["full"] == full and found["full backward"] == []
        # the whole objective, both branches: the log-probs' two, and for the full vocabulary the divergence's three
        both = [("all_reduce", tokens * 8), ("all_reduce", tokens * (2 + 1 + k) * 8)]
        assert found["loss, top-k"] == both and found["loss, top-k backward"] == []
        both[1] = ("all_reduce", tokens * (2 + 1) * 8)
        assert found["loss, full"] == both + full and found["loss, full backward"] == []
