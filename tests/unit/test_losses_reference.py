"""The routed objective against the plain reference in one process: value and gradient."""

import dataclasses
import math

import pytest
import torch

from megatron_srpo.losses import (
    LogitsHead,
    RoutedLoss,
    dynamic_weights,
    full_divergence,
    gather_logprobs,
    k3,
    policy_loss,
    topk,
    topk_divergence,
    vocab_parallel,
)
from megatron_srpo.losses.policy import rollout_weights, sequence_mean
from megatron_srpo.losses.terms import distilled_positions
from tests.losses_reference import divergence, objective, random_row
from tests.losses_reference import settings as settings_of

CASES = {
    "defaults": ({}, {}),
    "several_steps": ({}, {"old": True}),
    "forward_kl_without_tail": ({"divergence_alpha": 0.0, "distillation_tail": False}, {}),
    "reverse_kl": ({"divergence_alpha": 1.0}, {"old": True}),
    "skewed_mixture": ({"divergence_alpha": 0.25}, {}),
    "full_vocabulary": ({"divergence_alpha": 0.5}, {"full": True}),
    "dual_clip_kl_and_entropy": ({"dual_clip": 1.05, "kl_loss_coef": 0.3, "entropy_coef": 0.2}, {"old": True}),
    "no_correction_no_ratio": (
        {"rollout_correction": "off", "distill_ratio_clip": 0.0, "entropy_beta": 0.0},
        {"old": True},
    ),
    "mean over responses": (
        {"loss_aggregation": "seq-mean-token-mean", "kl_loss_coef": 0.3, "entropy_coef": 0.2},
        {"old": True},
    ),
    "token_mask": ({"rollout_correction": "mask", "rollout_correction_cap": 1.3}, {"old": True}),
    "sequence_mask": ({"rollout_correction": "sequence_mask", "rollout_correction_cap": 1.3}, {"old": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_plain_reference(case, monkeypatch):
    monkeypatch.setattr(vocab_parallel, "CHUNK_BYTES", {"cpu": 4 * 13 * 4})  # several chunks, the last one shorter
    settings, row = settings_of(**CASES[case][0]), CASES[case][1]
    for seed in range(3):
        logits, teacher, batch, sequences = random_row(
            seed, 13, k=4, kl=settings.kl_loss_coef, entropy=settings.entropy_coef, **row
        )
        logits.requires_grad_()
        expected = objective(logits, teacher, batch, settings, 9, 0.4, sequences, responses=3)
        (expected_gradient,) = torch.autograd.grad(expected, logits)
        loss, _ = RoutedLoss(settings)(LogitsHead(logits), batch, loss_tokens=9, responses=3, distill_weight_mean=0.4)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach() - expected.detach()) == pytest.approx(0, abs=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clip", [1.0, 1.5, 2.0, 2.1, 2.7])
def test_the_ratio_of_distillation_counts_up_to_its_clip_and_no_further(clip):
    """Where every token's ratio is above the clip, the loss is the clip times the loss without a ratio."""
    logits, _, batch, _ = random_row(0, 13, k=4, old=True)
    batch.weights["policy"].zero_()
    at = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]

    def loss(ratio, **keys):
        batch.scores.logprob = at - math.log(ratio)
        settings = settings_of(rollout_correction="off", **keys)
        return float(RoutedLoss(settings)(LogitsHead(logits), batch, loss_tokens=9, distill_weight_mean=0.4)[0])

    plain = loss(2.75, distill_ratio_clip=0.0)
    assert plain > 0.01
    assert loss(2.75, distill_ratio_clip=clip) == pytest.approx(clip * plain, rel=1e-12)
    assert loss(clip - 0.05, distill_ratio_clip=clip) == pytest.approx((clip - 0.05) * plain, rel=1e-12)


def test_alpha_names_the_direction_of_the_divergence():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    forward = 0.1 * math.log(0.1 / 0.7) + 0.1 * math.log(0.1 / 0.2) + 0.8 * math.log(0.8 / 0.1)
    reverse = 0.7 * math.log(0.7 / 0.1) + 0.2 * math.log(0.2 / 0.1) + 0.1 * math.log(0.1 / 0.8)
    for alpha, expected in ((0.0, forward), (1.0, reverse)):
        full = full_divergence(p.log()[None], q.log()[None], alpha, group=None)
        kept = topk_divergence(p.log()[None], q.log()[None], alpha, tail=False)
        assert float(full) == pytest.approx(expected, abs=1e-12)
        assert float(kept) == pytest.approx(expected, abs=1e-12)


def test_beta_zero_weighs_every_token_exactly_one():
    assert torch.equal(dynamic_weights(torch.tensor([0.0, 3.7, 80.0]), 0.0), torch.ones(3))


def test_minus_infinity_one_hot_and_uniform_logits_stay_finite():
    logits = torch.tensor(
        [[0.0, -math.inf, 1.0, -math.inf], [0.0, 0.0, 0.0, 0.0], [-math.inf, 900.0, -math.inf, -900.0]]
    )
    logits = logits.double().requires_grad_()
    logp, entropy = gather_logprobs(logits, torch.tensor([[0], [1], [1]]), vocab_start=0, group=None)
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    first = torch.tensor([0.0, 1.0]).double().softmax(0)
    expected = torch.tensor([float(-(first * first.log()).sum()), math.log(4), 0.0]).double()
    torch.testing.assert_close(entropy.detach(), expected)
    assert torch.isfinite(gradient).all()
    teacher = torch.tensor([[0.0, -math.inf, -math.inf, 2.0]] * 3).double()
    mixed = full_divergence(logits, teacher, 0.5, group=None)
    assert torch.isfinite(mixed).all() and (mixed >= 0).all()
    assert torch.isfinite(torch.autograd.grad(mixed.sum(), logits)[0]).all()


def test_topk_puts_the_lowest_id_first_among_equals_and_refuses_more_than_there_are():
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 7.0]])
    assert topk(logits, 4, vocab_start=0, group=None).tolist() == [[4, 1, 2, 3]]
    with pytest.raises(ValueError, match="distillation_topk"):
        topk(logits, 6, vocab_start=0, group=None)


def test_of_equal_logits_at_the_cut_the_lowest_ids_are_taken_however_the_vocabulary_is_split(monkeypatch):
    monkeypatch.setattr(vocab_parallel, "CHUNK_BYTES", {"cpu": 7 * 300 * 4})
    logits = (torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 2).round()  # a tenth are equal
    logits[0] = 3.0
    logits[1, 5:] = -math.inf
    expected = torch.sort(logits, descending=True, stable=True).indices[:, :20]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(topk(logits.to(dtype), 20, vocab_start=0, group=None), expected)
    for split in (1, 17, 150, 299):
        candidates = [
            vocab_parallel.local_candidates(part.contiguous(), 20, start)
            for part, start in ((logits[:, :split], 0), (logits[:, split:], split))
        ]
        assert torch.equal(vocab_parallel.merge_candidates(torch.cat(candidates, 1), 20, None)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_temperature_divides_in_full_precision(dtype):
    """As vLLM's sampler does; a bf16 logit divided in bf16 is 0.4 % off, 0.1 nats at a logit of 30."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 50, generator=g) * 10).to(dtype).requires_grad_()
    ids = torch.randint(0, 50, (9, 4), generator=g)
    plain = logits.detach().double().requires_grad_()
    logp = (plain / 0.7).log_softmax(-1)
    teacher = torch.randn(9, 50, generator=g, dtype=torch.float64).to(dtype)
    q = (teacher.double() / 0.7).softmax(-1)
    expected = [logp.gather(1, ids), -(logp.exp() * logp).sum(-1), (q * (q.log() - logp)).sum(-1)]
    found = [*gather_logprobs(logits, ids, vocab_start=0, group=None, temperature=0.7)]
    found.append(full_divergence(logits, teacher, 0.0, group=None, temperature=0.7))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-5)
        mix = torch.randn(mine.shape, generator=g)
        slope = torch.autograd.grad((mine * mix).sum(), logits, retain_graph=True)[0]
        exact = torch.autograd.grad((theirs * mix).sum(), plain, retain_graph=True)[0]
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-10  # the gradient is stored in the logits' own type
        torch.testing.assert_close(slope.double(), exact, rtol=bound, atol=bound / 10)


def test_a_dynamic_weight_stays_finite_where_fp32_has_no_exponential():
    logits, _, batch, _ = random_row(0, 13, k=4)
    batch = batch.map(lambda values: values.float() if values.is_floating_point() else values)
    batch.scores.teacher_entropy.fill_(12.0)
    results = []
    for beta, mean in ((0.0, 1.0), (40.0, math.exp(-480.0))):  # every token weighs the mean
        loss, _ = RoutedLoss(settings_of(entropy_beta=beta))(LogitsHead(logits.float()), batch, loss_tokens=9,
            distill_weight_mean=mean,
        )  # fmt: skip
        results.append(float(loss))
    assert results[0] == pytest.approx(results[1], rel=1e-5) and math.isfinite(results[0])


def test_garbage_outside_the_mask_does_not_reach_loss_or_gradient():
    logits, _, batch, _ = random_row(0, 13, k=4, old=True, kl=0.1)
    logits.requires_grad_()
    settings = settings_of(kl_loss_coef=0.1)

    def run():
        loss, _ = RoutedLoss(settings)(LogitsHead(logits), batch, loss_tokens=9, distill_weight_mean=1)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    clean = run()
    off = batch.loss_mask == 0
    scores = batch.scores
    for values in (batch.rollout_logprobs, scores.logprob, scores.reference_logprob, scores.teacher_entropy):
        values[off] = -1e30
    dirty = run()
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_an_empty_row_gives_an_exact_zero_that_backward_can_run_through():
    logits, _, batch, _ = random_row(0, 13, k=4)
    batch.loss_mask.zero_()
    logits.requires_grad_()
    loss, metrics = RoutedLoss(settings_of())(LogitsHead(logits), batch, loss_tokens=0, distill_weight_mean=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0.0 and torch.equal(gradient, torch.zeros_like(gradient))
    assert float(metrics["actor/entropy"].count) == 0.0
    assert float(metrics["rollout_corr/logprob_diff_max"]) == -math.inf  # unknown, which is not 0


def test_bf16_divergence_is_not_negative_and_near_its_float64_value():
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 999).bfloat16(), torch.randn(64, 999).bfloat16()
    exact = full_divergence(student.double(), teacher.double(), 0.5, group=None)
    rounded = full_divergence(student, teacher, 0.5, group=None)
    assert (full_divergence(student, student, 0.5, group=None) >= 0).all()
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-6)


def test_only_logits_and_small_tensors_are_saved_for_backward():
    logits = torch.randn(32, 4000).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        gather_logprobs(logits, torch.zeros(32, 5, dtype=torch.long), vocab_start=0, group=None)
    assert sum(saved) - logits.numel() * 2 <= 32 * (5 * (9 + 4) + 8)


def test_two_half_rows_add_up_to_the_whole_row():
    logits, _, batch, sequences = random_row(3, 13, k=4, old=True)
    whole, _ = RoutedLoss(settings_of())(LogitsHead(logits), batch, loss_tokens=9, distill_weight_mean=0.5)
    parts = 0.0
    for first in (True, False):
        keep = (sequences < 2) == first
        part = batch.map(lambda values, keep=keep: values[keep], without=("cu_seqlens",))
        part.cu_seqlens = torch.tensor([0, 5, 6] if first else [0, 6, 8]).int()
        half, _ = RoutedLoss(settings_of())(LogitsHead(logits[keep]), part, loss_tokens=9, distill_weight_mean=0.5)
        parts += float(half)
    assert parts == pytest.approx(float(whole), abs=1e-12)


def test_grpo_pieces_by_hand():
    logp = torch.tensor([math.log(0.5)] * 3).double()
    old = torch.tensor([math.log(0.25)] * 3).double()  # ρ = 2
    loss, clipped = policy_loss(logp - old, torch.tensor([1.0, -1.0, 0.0]).double(), clip_low=0.2, clip_high=0.28)
    assert loss.tolist() == pytest.approx([-1.28, 2.0, 0.0]) and clipped.tolist() == [True, False, False]
    assert float(k3(logp, old)[0]) == pytest.approx(0.5 - 1 + math.log(2))
    assert float(divergence([torch.tensor(1.0)], [torch.tensor(1.0)], 0.5)) == 0.0


def test_a_log_ratio_beyond_twenty_counts_as_twenty():
    """So that no loss is infinite, and no advantage of 0 makes a NaN of it."""
    far = torch.tensor([1000.0, -1000.0, 1000.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    loss, _ = policy_loss(far, advantages, clip_low=0.2, clip_high=0.28)
    assert loss.tolist() == pytest.approx([math.exp(20), -math.exp(-20), 0.0])
    largest = [math.exp(20) - 21, math.exp(-20) + 19, math.exp(20) - 21]
    assert k3(torch.zeros_like(far), far).tolist() == pytest.approx(largest)
    old = torch.cat([far[:1], torch.zeros(99, dtype=torch.float64)])
    bounds, mask = torch.tensor([0, 100]), torch.ones_like(old)
    for sign in (1, -1):  # one token of a hundred moves the sequence's mean by 0.2
        weights = rollout_weights(sign * old, 0 * old, mask, bounds, mode="sequence_mask", cap=1.3)
        assert weights[1:].equal(mask[1:])


def test_the_mean_of_a_sequence_is_that_of_its_masked_tokens_and_a_weight_at_the_cap_is_kept():
    values, mask = torch.tensor([1.0, 100.0, 3.0, 7.0, 100.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert sequence_mean(values, mask, torch.tensor([0, 3, 4, 5])).tolist() == [2.0, 2.0, 2.0, 7.0, 0.0]
    far = torch.tensor([-1.0, 0.0, 1.0])
    kept = rollout_weights(far, 0 * far, 1 + 0 * far, torch.tensor([0, 3]), mode="mask", cap=1.0)
    assert kept.tolist() == pytest.approx([math.exp(-1), 1.0, 0.0])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ids_that_have_all_the_mass_leave_a_tail_whose_log_is_finite(alpha):
    """In fp32 the mass of a sure student's or teacher's ids is exactly 1."""
    sure, other = torch.tensor([[0.0, -40.0, -50.0]]), torch.tensor([[0.5, 0.2, 0.2]]).log()
    for student, teacher in ((sure, other), (other, sure), (sure, sure)):
        student = student.clone().requires_grad_()
        found = topk_divergence(student, teacher, alpha, tail=True)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert found.isfinite().all() and gradient.isfinite().all()


def test_no_gradient_flows_into_the_teacher():
    student, teacher = (torch.randn(3, 5).log_softmax(-1).requires_grad_() for _ in range(2))
    for found in (
        topk_divergence(student, teacher, 0.5, tail=True),
        topk_divergence(student, teacher, 0.5, tail=False),
        full_divergence(student, teacher, 0.5, group=None),
    ):
        assert torch.autograd.grad(found.sum(), teacher, retain_graph=True, allow_unused=True) == (None,)
        assert torch.autograd.grad(found.sum(), student)[0].any()


def test_metrics_keep_no_row_in_memory():
    """They live until the step ends; with a graph behind one of them every row's activations would."""
    settings = settings_of(kl_loss_coef=0.1, entropy_coef=0.1)
    logits, _, batch, _ = random_row(0, 13, k=4, old=True, kl=0.1, entropy=0.1)
    batch.turn = torch.ones_like(batch.loss_mask)
    loss, metrics = RoutedLoss(settings)(
        LogitsHead(logits.requires_grad_()), batch, loss_tokens=9, distill_weight_mean=1
    )
    assert loss.requires_grad and len(metrics) > 15
    for name, metric in metrics.items():
        assert not any(torch.is_tensor(v) and v.requires_grad for v in vars(metric).values()), name


def test_the_gap_between_trainer_and_engine_is_told_for_each_turn_and_the_fourth_includes_later_ones():
    logits, _, batch, _ = random_row(0, 13, k=4, old=True)
    batch.turn = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 4, 1, 4])
    batch.loss_mask = (torch.arange(14) != 3).double()  # one token of the second turn is not trained
    _, metrics = RoutedLoss(settings_of())(LogitsHead(logits), batch, loss_tokens=9, distill_weight_mean=1.0)
    gap = (batch.scores.logprob - batch.rollout_logprobs).abs()
    on = batch.loss_mask > 0
    expected = {str(turn): gap[on & (batch.turn == turn)].mean() for turn in (1, 2, 3)}
    expected["4_and_later"] = gap[on & (batch.turn > 3)].mean()
    prefix = "rollout_corr/logprob_diff_turn_"
    found = {name.removeprefix(prefix): float(metric) for name, metric in metrics.items() if name.startswith(prefix)}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()})


def test_a_weight_that_no_term_takes_is_refused():
    logits, _, batch, _ = random_row(0, 13, k=4)
    batch = dataclasses.replace(batch, weights=batch.weights | {"guided": batch.loss_mask})
    with pytest.raises(AssertionError, match="no loss term is named \\['guided'\\]"):
        RoutedLoss(settings_of())(LogitsHead(logits), batch, loss_tokens=9, distill_weight_mean=1.0)


def test_the_positions_whose_top_k_ids_are_wanted_are_trained_and_distilled_and_never_none():
    _, _, batch, _ = random_row(0, 13, k=4)
    at = [t for t in range(14) if batch.loss_mask[t] > 0 and batch.weights["distill"][t] > 0]
    assert 0 < len(at) < int((batch.weights["distill"] > 0).sum())  # some distilled token is not trained
    assert distilled_positions(batch).tolist() == at
    batch.weights["distill"].zero_()
    assert distilled_positions(batch).tolist() == [0]
    del batch.weights["distill"]
    assert distilled_positions(batch).tolist() == [0]
