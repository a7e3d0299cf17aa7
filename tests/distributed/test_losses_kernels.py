"""The Triton kernels, interpreted on a CPU, against float64: on one process and with the vocabulary on two gloo ranks.

Triton decides at import whether it interprets, so every check runs in processes of its own.
"""

import importlib.util

import pytest
import torch

from tests.distributed_harness import run_distributed
from tests.losses_reference import objective, random_row
from tests.losses_reference import settings as settings_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and `make test-gpu`")
PLACES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, request):
    if request.node.callspec.params["device"] == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def shapes_and_kinds():
    """[T, V] logits of odd sizes: ordinary, with −inf, all −inf but one, one-hot, uniform, huge."""
    g = torch.Generator().manual_seed(0)
    for width in (1, 29, 4096, 5003):
        logits = torch.randn(7, width, generator=g) * 3
        logits[1, torch.rand(width, generator=g) < 0.5] = -torch.inf
        logits[1, 0] = 0.3
        logits[2, 1:] = -torch.inf
        logits[3] = -200.0
        logits[3, width // 2] = 200.0
        logits[4] = 1.5
        logits[5] *= 1e4
        yield logits


def check_statistics_and_gradient(count, device):
    from megatron_srpo.losses import gather_logprobs, kernels

    g = torch.Generator().manual_seed(1)
    for logits in shapes_and_kinds():
        logits = logits.to(device)
        ids = torch.randint(0, logits.size(1), (7, count), generator=g)
        ids[:, 4] = ids[:, 0]  # an id asked for twice
        ids[2] = 0  # the only one with any probability
        ids[1] = 0
        mix = torch.randn(7, count + 1, generator=g, dtype=torch.float64).to(device) / count**0.5
        ids = ids.to(device)
        for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
            mine = logits.to(dtype).requires_grad_()
            assert kernels.serve(mine)
            exact = mine.detach().double().requires_grad_()
            results = []
            for given in (mine, exact):
                logprobs, entropy = gather_logprobs(given, ids, vocab_start=0, group=None)
                both = torch.cat([logprobs, entropy[:, None]], 1).double()
                results.append((both.detach(), torch.autograd.grad((both * mix).sum(), given)[0].double()))
            (value, gradient), (expected, slope) = results
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
            assert torch.isfinite(gradient).all()
            torch.testing.assert_close(gradient, slope, rtol=bound, atol=bound)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("count", [5, 300])  # ids, one tile of them and several
def test_statistics_and_gradient_equal_float64_on_every_kind_of_row(count, device):
    run_distributed(check_statistics_and_gradient, 1, count, device, fresh=True)


def check_topk(device):
    """Rounded logits, of which many are equal, and rows of nothing but −inf or of one value."""
    from megatron_srpo.losses import kernels, vocab_parallel

    g = torch.Generator().manual_seed(5)
    for width in (3, 29, 4096, 9001):
        logits = (torch.randn(9, width, generator=g) * 2).round()
        logits[1] = -torch.inf
        logits[2] = 0.5
        logits[3, 1:] = -torch.inf
        logits[4] = torch.randn(width, generator=g)  # nothing equal
        logits[5, -2:] = 9.0  # the two largest at the end, the cut among what is equal
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(device, dtype)
            assert kernels.serve(given)
            for k in (1, 2, 20):
                found = vocab_parallel.local_candidates(given, k, 1000)
                best = min(k, width)
                where = given.double().sort(dim=1, descending=True, stable=True).indices[:, :best]
                expected = torch.stack([given.double().gather(1, where), (where + 1000).double()], 2)
                order = found[:, :best, 1].argsort(dim=1)  # of larger ones that are equal, in any order
                chosen = found[:, :best].gather(1, order[..., None].expand(-1, -1, 2))
                order = expected[..., 1].argsort(dim=1)
                assert torch.equal(chosen, expected.gather(1, order[..., None].expand(-1, -1, 2)))


@pytest.mark.parametrize("device", PLACES)
def test_of_equal_logits_the_lowest_ids_are_taken(device):
    run_distributed(check_topk, 1, device, fresh=True)


def check_entropy_alone(device):
    from megatron_srpo.losses import gather_logprobs

    logits = torch.randn(5, 77, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    ids = torch.zeros(5, 1, dtype=torch.long, device=device)
    _, entropy = gather_logprobs(logits, ids, vocab_start=0, group=None)
    (found,) = torch.autograd.grad(entropy.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    logp = exact.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(logp.exp() * logp).sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", PLACES)
def test_the_entropy_has_a_gradient_of_its_own(device):
    run_distributed(check_entropy_alone, 1, device, fresh=True)


def check_divergence(alpha, device):
    from megatron_srpo.losses import full_divergence

    g = torch.Generator().manual_seed(3)
    for width in (1, 29, 2048, 3001):
        student, teacher = (torch.randn(6, width, generator=g) * 3 for _ in range(2))
        student[1] = teacher[1]
        student[2], teacher[2] = 0.0, 0.0
        teacher[3] = -200.0  # a one-hot teacher
        teacher[3, width // 2] = 200.0
        if width > 1:  # outside the support of both, and of the teacher alone where its logarithm is not needed
            student[4, 0] = teacher[4, 0] = -torch.inf
            if alpha != 1:
                teacher[5, 1] = -torch.inf
        student, teacher = student.to(device), teacher.to(device)
        given = torch.randn(6, generator=g).to(device)
        mine = student.clone().requires_grad_()
        exact = student.double().requires_grad_()
        value = full_divergence(mine, teacher, alpha, group=None)
        expected = full_divergence(exact, teacher.double(), alpha, group=None)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-5)
        (found,) = torch.autograd.grad((value * given).sum(), mine)
        (slope,) = torch.autograd.grad((expected * given.double()).sum(), exact)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), slope, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_divergence_and_its_gradient_equal_float64(alpha, device):
    run_distributed(check_divergence, 1, alpha, device, fresh=True)


def check_objective(device):
    """The whole loss of a row, with the LM head joined; two ranks have unequal widths. The kernels do the work."""
    import torch.distributed as dist

    from megatron_srpo.losses import LinearHead, RoutedLoss, kernels

    vocab, split = 13, 8
    cut = slice(0, vocab) if dist.get_world_size() == 1 else [slice(0, split), slice(split, vocab)][dist.get_rank()]
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(14, 6, generator=g)
    weight = torch.randn(vocab, 6, generator=g)
    for settings, row in (
        (settings_of(entropy_coef=0.1, kl_loss_coef=0.2), {"old": True, "k": 10}),
        (settings_of(divergence_alpha=0.25), {"full": True, "k": 0}),
    ):
        _, teacher, batch, sequences = random_row(
            5, vocab, kl=settings.kl_loss_coef, entropy=settings.entropy_coef, **row
        )
        plain = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
        expected = objective(plain[0] @ plain[1].T / 0.7, teacher, batch, settings, 9, 0.4, sequences)
        gradients = torch.autograd.grad(expected, plain)
        if batch.scores.teacher_logits is not None:
            batch.scores.teacher_logits = 0.7 * teacher[:, cut].float()  # the head divides them again
        batch = batch.map(lambda value: (value.float() if value.dtype == torch.float64 else value).to(device))
        for budget in (2**20, 5 * 4 * split):
            mine, shard = (x.to(device, copy=True).requires_grad_() for x in (hidden, weight[cut]))
            assert kernels.serve(mine)
            head = LinearHead(mine, shard, shard.size(0), cut.start, dist.group.WORLD, 0.7, budget)
            loss, _ = RoutedLoss(settings)(head, batch, loss_tokens=9, distill_weight_mean=0.4)
            grad_hidden, grad_weight = torch.autograd.grad(loss, [mine, shard])
            dist.all_reduce(grad_hidden)
            torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad_hidden.cpu().double(), gradients[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad_weight.cpu().double(), gradients[1][cut], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", PLACES)
def test_the_objective_through_the_kernels_equals_the_reference(device):
    run_distributed(check_objective, 2 if device == "cpu" else 1, device, fresh=True)


def check_a_real_vocabulary():
    """bf16 at V = 151,936: the logits once and in pieces, the weight's gradient added to an fp32 one."""
    from megatron_srpo.losses import LinearHead
    from megatron_srpo.losses.linear import iterate_logits

    g = torch.Generator(device="cuda").manual_seed(4)
    tokens, width, vocab, asked = 96, 256, 151_936, 101
    hidden = torch.randn(tokens, width, generator=g, device="cuda").bfloat16()
    weight = (torch.randn(vocab, width, generator=g, device="cuda") * 0.2).bfloat16()
    ids = torch.randint(0, vocab, (tokens, asked), generator=g, device="cuda")
    mix = torch.randn(tokens, asked + 1, generator=g, device="cuda")
    for budget in (2**34, 40 * 2 * vocab):
        mine, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head.main_grad = torch.ones(vocab, width, device="cuda")
        # the head's own products, as they are rounded; everything after them in float64
        logits = torch.cat(list(iterate_logits(hidden, weight, width=vocab, budget_bytes=budget))).double()
        logits.requires_grad_()
        logp = logits.log_softmax(-1)
        exact = torch.cat([logp.gather(1, ids), -(logp.exp() * logp).sum(-1, keepdim=True)], 1)
        (slope,) = torch.autograd.grad((exact * mix).sum(), logits)
        logprobs, entropy = LinearHead(mine, head, vocab, budget_bytes=budget).gather_logprobs(ids)
        found = torch.cat([logprobs, entropy[:, None]], 1)
        torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-5, atol=1e-5)
        (found * mix).sum().backward()
        for gradient, expected in (
            (mine.grad, slope @ weight.double()),
            (head.main_grad - 1, slope.T @ hidden.double()),
        ):
            error = (gradient.double() - expected).norm() / expected.norm()
            assert error < 4e-3, error  # the logits' gradient is rounded to bf16
        assert head.grad is None
        picked = LinearHead(mine, head, vocab, budget_bytes=budget).topk(asked)
        where = logits.detach().sort(dim=1, descending=True, stable=True).indices  # of equals the lowest ids
        assert torch.equal(picked, where[:, :asked])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_a_real_vocabulary_on_a_gpu_equals_float64(device):
    run_distributed(check_a_real_vocabulary, 1, fresh=True)
