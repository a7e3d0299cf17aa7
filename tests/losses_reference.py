"""The objective in plain float64 torch on full logits, written from the formulas alone, token by token."""

import math

import torch

from megatron_srpo.algorithms import Distillation
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.core.tensors import PackedBatch, Scores


def settings(**keys) -> Distillation:
    """SRPO's, β = 1, with these keys."""
    return algorithm("srpo", **keys)


def divergence(p, q, alpha):
    """Generalised Jensen–Shannon divergence of two probability vectors."""

    def kl(a, b):
        return sum(x * (x / y).log() for x, y in zip(a, b, strict=True) if float(x.detach()) > 0)

    if alpha == 0:
        return kl(q, p)
    if alpha == 1:
        return kl(p, q)
    m = [(1 - alpha) * x + alpha * y for x, y in zip(p, q, strict=True)]
    return alpha * kl(q, m) + (1 - alpha) * kl(p, m)


def coarse(logp, ids, tail):
    """The distribution on the k ids and the tail, or renormalised over the ids."""
    kept = [logp[i].exp() for i in ids]
    if tail:
        return [*kept, 1 - sum(kept)]
    return [x / sum(kept) for x in kept]


def objective(logits, teacher, batch: PackedBatch, s: Distillation, loss_tokens, weight_mean, sequences, responses=0):
    """The sum over tokens of SRPO §3.3. logits, teacher [T, V] float64; sequences [T] sequence numbers. `responses` is
    the denominator of a mean over responses."""
    count = batch.loss_mask.new_zeros(int(sequences.max()) + 1).index_add(0, sequences, batch.loss_mask)
    logp = logits.log_softmax(-1)
    logq = teacher.log_softmax(-1)
    total = logits.sum() * 0
    for t in range(logits.size(0)):
        if batch.loss_mask[t] == 0:
            continue
        before = total
        lp = logp[t, batch.targets[t]]
        old = lp.detach() if batch.scores.logprob is None else batch.scores.logprob[t]
        rho, advantage = (lp - old).exp(), batch.advantages[t]
        clipped = min(
            max(rho, torch.tensor(1 - s.clip_ratio_low, dtype=torch.float64)),
            torch.tensor(1 + s.clip_ratio_high, dtype=torch.float64),
        )
        surrogate = min(rho * advantage, clipped * advantage)
        if s.dual_clip and advantage < 0:
            surrogate = max(surrogate, s.dual_clip * advantage)
        r = correction(t, logp.detach(), batch, s, sequences)
        term = -surrogate * r
        if s.kl_loss_coef:
            gap = batch.scores.reference_logprob[t] - lp
            term = term + s.kl_loss_coef * (gap.exp() - 1 - gap)
        if s.entropy_coef:
            term = term + s.entropy_coef * (logp[t].exp() * logp[t]).sum()
        total = total + batch.weights["policy"][t] * term
        if batch.weights["distill"][t] > 0:
            p, q = logp[t].exp(), logq[t].exp()
            if batch.scores.topk_ids is not None:
                ids = batch.scores.topk_ids[t].tolist()
                p, q = coarse(logp[t], ids, s.distillation_tail), coarse(logq[t], ids, s.distillation_tail)
            entropy = -(logq[t].exp() * logq[t]).sum()
            weight = math.exp(-s.beta * entropy) / weight_mean
            ratio = 1.0
            if s.distill_ratio_clip and batch.scores.logprob is not None:
                ratio = min(float((lp.detach() - old).exp()), s.distill_ratio_clip)
            total = total + batch.weights["distill"][t] * weight * ratio * r * divergence(p, q, s.divergence_alpha)
        if s.loss_aggregation == "seq-mean-token-mean":
            total = before + (total - before) / count[sequences[t]]
    return total / (responses if s.loss_aggregation == "seq-mean-token-mean" else loss_tokens)


def correction(t, logp, batch, s, sequences):
    """π_old/π_roll of a token under the four modes."""

    def log_ratio(i):
        old = logp[i, batch.targets[i]] if batch.scores.logprob is None else batch.scores.logprob[i]
        return float(old - batch.rollout_logprobs[i])

    ratio, cap = math.exp(log_ratio(t)), s.rollout_correction_cap
    if s.rollout_correction == "off":
        return 1.0
    if s.rollout_correction == "mask":
        return ratio if ratio <= cap else 0.0
    if s.rollout_correction == "sequence_mask":
        mine = [i for i in range(logp.size(0)) if sequences[i] == sequences[t] and batch.loss_mask[i] > 0]
        mean = sum(log_ratio(i) for i in mine) / len(mine)
        return 0.0 if abs(mean) > math.log(cap) else min(ratio, cap)
    return min(ratio, cap)


def random_row(seed, vocab, *, k, full=False, old=False, kl=0.0, entropy=0.0):
    """A row of 3 sequences and padding: student and teacher logits [T, V], the batch, and sequence numbers."""
    g = torch.Generator().manual_seed(seed)
    lengths = [5, 1, 6, 2]  # the last one is padding
    total = sum(lengths)
    sequences = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logits = torch.randn(total, vocab, generator=g, dtype=torch.float64) * 2
    teacher = torch.randn(total, vocab, generator=g, dtype=torch.float64) * 2
    mask = (sequences < 3).double() * (torch.rand(total, generator=g) > 0.2)
    targets = torch.randint(0, vocab, (total,), generator=g)
    logp = logits.log_softmax(-1)
    at = logp.gather(1, targets[:, None])[:, 0]
    noise = torch.randn(3, total, generator=g, dtype=torch.float64) * 0.6
    distill = torch.tensor([0.0, 0.3, 1.0, 0.0])[sequences].double()
    ids = logp.topk(k, 1)[1] if k else None
    logq = teacher.log_softmax(-1)
    policy = torch.tensor([1.0, 0.7, 0.0, 0.0])[sequences].double()
    weights = {"policy": policy, "distill": distill}
    weights |= {"kl": kl * policy} if kl else {}
    weights |= {"entropy": entropy * policy} if entropy else {}
    count = torch.zeros(4).double().index_add(0, sequences, mask)
    batch = PackedBatch(
        input_ids=targets.roll(1), targets=targets, position_ids=torch.arange(total),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), loss_mask=mask,
        # Signs alternate from token to token, which no sequence has: both clips of both signs then act in one row.
        advantages=torch.tensor([0.7, -1.1, -0.4, 0.0])[sequences].double() * (-1.0) ** torch.arange(total),
        rollout_logprobs=at + noise[0], first_token=torch.zeros(total, dtype=torch.float64), weights=weights,
        response_tokens=count[sequences] * mask,
        scores=Scores(
            logprob=at + noise[1] if old else None, reference_logprob=at + noise[2], topk_ids=None if full else ids,
            teacher_logprobs=None if full else logq.gather(1, ids), teacher_logits=teacher if full else None,
            teacher_entropy=-(logq.exp() * logq).sum(-1),
        ),
    )  # fmt: skip
    return logits, teacher, batch, sequences
