"""The objective with the vocabulary on two gloo ranks of unequal width equals the plain reference."""

import torch
import torch.distributed as dist

from megatron_srpo.losses import LossSettings, full_divergence, gather_logprobs, routed_loss, topk
from tests.distributed_harness import run_distributed
from tests.losses_reference import objective, random_row

VOCAB, SPLIT = 13, 8  # rank 0 has 8 columns, rank 1 has 5


def _shard():
    return slice(0, SPLIT) if dist.get_rank() == 0 else slice(SPLIT, VOCAB)


def _objective_on_ranks():
    group, cut = dist.group.WORLD, _shard()
    for settings, row in (
        (LossSettings(), {}),
        (LossSettings(alpha=1.0, kl_loss_coef=0.2, entropy_coef=0.1), {"old": True}),
        (LossSettings(alpha=0.25), {"full": True}),
    ):
        logits, teacher, batch, sequences = random_row(5, VOCAB, k=10, **row)  # k is wider than rank 1's shard
        logits.requires_grad_()
        expected = objective(logits, teacher, batch, settings, 9, 0.4, sequences)
        (expected_gradient,) = torch.autograd.grad(expected, logits)
        if batch.topk_ids is not None:
            assert torch.equal(topk(logits.detach()[:, cut], 10, vocab_start=cut.start, group=group), batch.topk_ids)
        else:
            batch.teacher_logits = teacher[:, cut]
        mine = logits.detach()[:, cut].clone().requires_grad_()
        loss, _ = routed_loss(
            mine, batch, settings, loss_tokens=9, distill_weight_mean=0.4, vocab_start=cut.start, group=group
        )
        (gradient,) = torch.autograd.grad(loss, mine)
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient[:, cut], rtol=0, atol=1e-10)


def test_two_ranks_equal_the_reference_in_value_and_gradient():
    run_distributed(_objective_on_ranks, 2)


def _count_collectives():
    calls = []

    def counted(name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            calls.append(name)
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
    value = measure("full", lambda: full_divergence(mine, teacher[:, cut], 0.5, group=dist.group.WORLD))
    measure("full backward", lambda: value.sum().backward())
    return found


def test_logprob_and_entropy_take_two_collectives_and_backward_none():
    for found in run_distributed(_count_collectives, 2):
        assert found["forward"] == ["all_reduce"] * 2
        assert found["backward"] == []
        assert found["topk"] == ["all_gather"]
        assert found["full"] == ["all_reduce"] * 3
        assert found["full backward"] == []
