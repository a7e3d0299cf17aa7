"""Softmax quantities of logits whose vocabulary is split over tensor-parallel ranks. No rank ever sees [T, V].

Legend: T tokens of a row, v this rank's part of the vocabulary (ranks may differ in width), M ids asked for per token,
K top-k. `vocab_start` is the global id of this rank's first column; `group` is the tensor-parallel process group, None
for one process.

Everything is computed in fp32 (fp64 stays fp64) for one chunk of tokens at a time, so there is never an fp32 copy of
all logits [T, v]. The backward pass needs the logits in their own dtype and O(T·M) values.

The temperature τ divides the logits in fp32, as in vLLM's sampler. Dividing in bf16 would round them a second time, and
trainer and engine would differ. `scale` is 1/τ, and x below stands for `scale` · logit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_srpo.losses import kernels

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}  # of one temporary [chunk, v]; a CPU's stays in its cache
FLOOR = -1e4  # a log-ratio below has e^x = 0 in fp32 and in fp64: bounding it there makes 0 · −∞ a 0


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def rows_at_once(logits: Tensor) -> int:
    """How many rows have an fp32 copy below CHUNK_BYTES."""
    return max(1, CHUNK_BYTES[logits.device.type] // max(1, 4 * logits.size(1)))


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of tokens of rows_at_once."""
    size = rows_at_once(logits)
    return (slice(start, start + size) for start in range(0, logits.size(0), size))


def _all_reduce(values: Tensor, operation: Any, group: ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(values, operation, group=group)


def _row_max(logits: Tensor) -> Tensor:
    """[T] this rank's largest logit; 0 where all are −inf or there is none, so that x − max stays defined."""
    if not logits.size(1):
        return torch.zeros(logits.size(0), dtype=_work_dtype(logits), device=logits.device)
    top = logits.amax(1).to(_work_dtype(logits))
    return top.masked_fill(top == -math.inf, 0.0)


def _common_max(mine: Tensor, mass: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest of the ranks' row maxima, of those that have any mass there; 0 where none has."""
    top = mine.masked_fill(mass == 0, -math.inf)
    _all_reduce(top, dist.ReduceOp.MAX, group)
    return top.masked_fill(top == -math.inf, 0.0)


def _local(ids: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """The columns of global ids on this rank, clamped to its part, and whether each id belongs to this part."""
    columns = ids - vocab_start
    here = (columns >= 0) & (columns < width)
    return columns.clamp(0, max(0, width - 1)), here


def _shifted(logits: Tensor, base: Tensor, scale: float) -> Tensor:
    """x − base [T, v], in the dtype of `base` [T]."""
    return torch.add(-base[:, None], logits, alpha=scale)


def _times(weight: Tensor, values: Tensor) -> Tensor:
    """weight · values, with 0 · ±inf = 0 (a logit of −inf has probability 0 and adds nothing)."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * values)


def local_statistics(logits: Tensor, columns: Tensor, here: Tensor, sums: Tensor, scale: float = 1.0) -> Tensor:
    """This rank's row maxima m [T] of x, and Σ e^(x−m), Σ e^(x−m)·(x−m) and x − m at the columns that are here into
    `sums` [T, 2 + M]."""
    if kernels.serve(logits):
        from megatron_srpo.losses.kernels.softmax import statistics

        mine = statistics(logits, sums, scale)
    else:
        mine = _row_max(logits).mul_(scale)
        for part in _chunks(logits):
            shifted = _shifted(logits[part], mine[part], scale).clamp_(min=FLOOR)
            weights = shifted.exp()
            sums[part, 0] = weights.sum(1)
            sums[part, 1] = shifted.mul_(weights).sum(1)
    if logits.size(1) and columns.size(1):
        found = _shifted(logits.gather(1, columns), mine, scale)
        sums[:, 2:] = torch.where(here, found, torch.zeros_like(found))
    return mine


def combine_statistics(
    mine: Tensor, sums: Tensor, here: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks: log Σ e^x [T], the entropy [T] and the log-probs at the ids [T, M]; `sums` is used up.

    Each rank's sums are relative to its own maximum m and move to the common one m*: MAX, then one SUM of [T, 2 + M].
        Σ e^(x−m*) = e^d · S₀        Σ e^(x−m*)·(x−m*) = e^d · (S₁ + d·S₀)        d = m − m*
    """
    top = _common_max(mine, sums[:, 0], group)
    distance = torch.where(sums[:, 0] > 0, mine - top, torch.zeros_like(top))  # no mass here: nothing to move
    sums[:, 1] = distance.exp() * (sums[:, 1] + distance * sums[:, 0])
    sums[:, 0] *= distance.exp()
    sums[:, 2:] += torch.where(here, (mine - top)[:, None], torch.zeros_like(sums[:, 2:]))
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    log_sum = sums[:, 0].log()
    return top + log_sum, log_sum - sums[:, 1] / sums[:, 0], sums[:, 2:] - log_sum[:, None]


def write_logits_gradient(
    logits: Tensor, out: Tensor, normaliser: Tensor, entropy: Tensor, columns: Tensor, here: Tensor, logprobs: Tensor,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, scale: float = 1.0,
) -> None:  # fmt: skip
    """The gradient of the logits [T, v] into `out`, which may be the logits, from those of log-probs [T, M] and
    entropy [T]. The other arguments are what the forward pass knew. With z = Σ exp(x), p = exp(x)/z, H = log z − Σ p·x:
        ∂ log p_i / ∂x_j = 1[i = j] − p_j          ∂H / ∂x_j = −p_j (log p_j + H)
    """
    if kernels.serve(logits):
        from megatron_srpo.losses.kernels.softmax import write_gradient

        write_gradient(logits, out, normaliser, entropy, columns, here, logprobs, grad_logprobs, grad_entropy, scale)
        return
    given = torch.zeros_like(logprobs) if grad_logprobs is None else scale * grad_logprobs * here
    slopes = torch.zeros_like(normaliser) if grad_logprobs is None else scale * grad_logprobs.sum(1)
    for part in _chunks(logits):
        same = out.dtype == normaliser.dtype
        gradient = out[part] if same else torch.empty_like(out[part], dtype=normaliser.dtype)
        torch.add(-normaliser[part, None], logits[part], alpha=scale, out=gradient)
        if grad_entropy is None:
            gradient.exp_().mul_(-slopes[part, None])
        else:
            p = gradient.exp()
            gradient.add_(entropy[part, None]).clamp_(min=FLOOR).mul_(-scale * grad_entropy[part, None])
            gradient.sub_(slopes[part, None]).mul_(p)
        if logits.size(1):
            gradient.scatter_add_(1, columns[part], given[part])
        if not same:
            out[part] = gradient


class _GatherLogprobs(torch.autograd.Function):
    """Log-probs at ids, the entropy, and without gradient the normaliser: two collectives forward, none in backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, vocab_start: int, group: ProcessGroup | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        columns, here = _local(ids, vocab_start, logits.size(1))
        sums = torch.zeros(logits.size(0), 2 + ids.size(1), dtype=_work_dtype(logits), device=logits.device)
        mine = local_statistics(logits, columns, here, sums, scale)
        normaliser, entropy, logprobs = combine_statistics(mine, sums, here, group)
        ctx.scale = scale
        ctx.save_for_backward(logits, normaliser, entropy, columns, here, logprobs)
        ctx.mark_non_differentiable(normaliser)
        return logprobs, entropy, normaliser

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Any, ...]:
        logits, *known = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 5
        gradient = torch.empty_like(logits)
        write_logits_gradient(logits, gradient, *known, grad_logprobs, grad_entropy, ctx.scale)
        return gradient, None, None, None, None


def gather_statistics(
    logits: Tensor, ids: Tensor, *, vocab_start: int, group: ProcessGroup | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs at global ids and the entropy of softmax(logits ÷ temperature), both over the whole vocabulary and
    differentiable, and the log of its normaliser, log Σ exp(logit ÷ temperature), without gradient.

    logits [T, v], ids [T, M] int64 → ([T, M], [T], [T]) fp32, nats. Two collectives forward, none backward.
    """
    return _GatherLogprobs.apply(logits, ids, vocab_start, group, 1 / temperature)


def gather_logprobs(
    logits: Tensor, ids: Tensor, *, vocab_start: int, group: ProcessGroup | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The log-probs and the entropy of `gather_statistics`."""
    return gather_statistics(logits, ids, vocab_start=vocab_start, group=group, temperature=temperature)[:2]


def local_candidates(logits: Tensor, k: int, vocab_start: int) -> Tensor:
    """This rank's k best of its own columns as [T, k, 2]: logit and global id; −inf where it has fewer. Of equal logits
    the lowest ids are taken: in bf16 there are many, and torch.topk's choice depends on the width of the shard."""
    best = min(k, logits.size(1))
    values, columns = logits.topk(min(k + 1, logits.size(1)), dim=1)
    if best < values.size(1):
        _lowest_of_equals(logits, values, columns)
    candidates = torch.full((logits.size(0), k, 2), -math.inf, dtype=torch.float64, device=logits.device)
    candidates[:, :best, 0] = values[:, :best].double()  # exact for every logit dtype, and for ids below 2^53
    candidates[:, :best, 1] = (columns[:, :best] + vocab_start).double()
    return candidates


def _lowest_of_equals(logits: Tensor, values: Tensor, columns: Tensor) -> None:
    """values, columns [T, k + 1]: each row's largest logits, and where. In rows whose k-th equals the next one, the
    lowest of all columns with that value take the places from the first of them to the k-th."""
    k = values.size(1) - 1
    cut = values[:, k - 1]
    tied, above = cut == values[:, k], (values[:, :k] > cut[:, None]).sum(1)
    if kernels.serve(logits):
        from megatron_srpo.losses.kernels.topk import lowest_of_equals

        lowest_of_equals(logits, cut, tied, above, columns, k)
        return
    for rows in tied.nonzero()[:, 0].split(max(1, CHUNK_BYTES[logits.device.type] // logits.size(1))):
        row, column = (logits[rows] == cut[rows, None]).nonzero(as_tuple=True)  # by row, then by column
        first = torch.searchsorted(row, torch.arange(len(rows), device=row.device))
        place = above[rows][row] + torch.arange(len(row), device=row.device) - first[row]
        fits = place < k
        columns[rows[row[fits]], place[fits]] = column[fits]


def merge_candidates(candidates: Tensor, k: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The logits [T, k] fp64 and the global ids [T, k] of the k best candidates of all ranks: one gather."""
    if group is not None:
        parts = [torch.empty_like(candidates) for _ in range(group.size())]
        dist.all_gather(parts, candidates, group=group)
        candidates = torch.cat(parts, 1)
    values, ids = candidates.unbind(-1)
    if group is None and bool((values[:, 1:] < values[:, :-1]).all() and (ids[:, -1:] >= 0).all()):
        return values, ids.long()  # they are in order, no two are equal, and none is missing
    by_id = ids.masked_fill(ids == -math.inf, math.inf).argsort(dim=1, stable=True)
    candidates = candidates.gather(1, by_id[..., None].expand(-1, -1, 2))
    order = candidates[..., 0].argsort(dim=1, descending=True, stable=True)[:, :k]
    values, chosen = candidates.gather(1, order[..., None].expand(-1, -1, 2)).unbind(-1)
    if not torch.isfinite(chosen).all():
        raise ValueError(f"top-k of {k} asked for, but the vocabulary has fewer entries: lower distillation_topk")
    return values, chosen.long()


@torch.no_grad()
def topk(logits: Tensor, k: int, *, vocab_start: int, group: ProcessGroup | None) -> Tensor:
    """Global ids of the k largest logits, largest first and lower ids first among equals, the same on every rank.

    logits [T, v] → [T, k] int64. One gather of the ranks' own candidates.
    """
    return merge_candidates(local_candidates(logits, k, vocab_start), k, group)[1]


def _divergence_terms(logp: Tensor, logq: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Per vocabulary entry: its term of D, and ∂D/∂p up to a constant (constants vanish under the softmax)."""
    p, q = logp.exp(), logq.exp()
    if alpha == 0.0:  # KL(q‖p): Σ q (log q − log p), ∂/∂p = −q/p; times p below, so −q
        return _times(q, logq - logp), -q
    if alpha == 1.0:  # KL(p‖q)
        ratio = logp - logq
        return _times(p, ratio), _times(p, ratio)
    logm = torch.logaddexp(logp + math.log1p(-alpha), logq + math.log(alpha))
    from_p, from_q = logp - logm, logq - logm
    # D = α KL(q‖m) + (1−α) KL(p‖m), m = (1−α) p + α q. ∂D/∂p = (1−α) log(p/m): the other terms cancel.
    return alpha * _times(q, from_q) + (1 - alpha) * _times(p, from_p), (1 - alpha) * _times(p, from_p)


def _log_normalisers(student: Tensor, teacher: Tensor, group: ProcessGroup | None, scale: float) -> Tensor:
    """log Σ e^x of both over the whole vocabulary, [2, T]: MAX, then one SUM."""
    nothing = torch.zeros(student.size(0), 0, dtype=torch.long, device=student.device)
    sums = torch.zeros(2, student.size(0), 2, dtype=_work_dtype(student), device=student.device)
    mine = torch.stack(
        [local_statistics(x, nothing, nothing, sums[i], scale) for i, x in enumerate((student, teacher))]
    )
    tops = _common_max(mine, sums[..., 0], group)
    mass = torch.where(sums[..., 0] > 0, sums[..., 0] * (mine - tops).exp(), torch.zeros_like(tops))
    _all_reduce(mass, dist.ReduceOp.SUM, group)
    return tops + mass.log()


def _divergence_sums(student: Tensor, teacher: Tensor, normalisers: Tensor, alpha: float, scale: float) -> Tensor:
    """[T, 2]: this rank's part of D and of Σ p · ∂D/∂p."""
    if kernels.serve(student):
        from megatron_srpo.losses.kernels.divergence import divergence_sums

        return divergence_sums(student, teacher, normalisers, alpha, scale)
    totals = torch.zeros(student.size(0), 2, dtype=normalisers.dtype, device=student.device)
    for part in _chunks(student):
        logp = _shifted(student[part], normalisers[0, part], scale)
        logq = _shifted(teacher[part], normalisers[1, part], scale)
        value, slope = _divergence_terms(logp, logq, alpha)
        totals[part] = torch.stack([value.sum(1), slope.sum(1)], 1)
    return totals


class _FullDivergence(torch.autograd.Function):
    """D(student, teacher) over the whole vocabulary; ∂D/∂x_j = g_j − p_j Σ g with g = p · ∂D/∂p.

    Collectives: MAX and SUM for both normalisers, then one SUM of [T, 2]; none in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, alpha: float, group: ProcessGroup | None, scale: float
    ) -> Tensor:
        normalisers = _log_normalisers(student, teacher, group, scale)
        totals = _divergence_sums(student, teacher, normalisers, alpha, scale)
        _all_reduce(totals, dist.ReduceOp.SUM, group)
        ctx.alpha, ctx.scale = alpha, scale
        ctx.save_for_backward(student, teacher, normalisers, totals[:, 1])
        return totals[:, 0].clamp_min(0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        student, teacher, normalisers, slope_sum = ctx.saved_tensors
        if kernels.serve(student):
            from megatron_srpo.losses.kernels.divergence import divergence_gradient

            gradient = divergence_gradient(student, teacher, normalisers, slope_sum, grad, ctx.alpha, ctx.scale)
            return gradient, None, None, None, None
        gradient = torch.empty_like(student)
        for part in _chunks(student):
            logp = _shifted(student[part], normalisers[0, part], ctx.scale)
            logq = _shifted(teacher[part], normalisers[1, part], ctx.scale)
            _, slope = _divergence_terms(logp, logq, ctx.alpha)
            piece = slope - logp.exp() * slope_sum[part, None]
            gradient[part] = (piece * (ctx.scale * grad[part, None])).to(student.dtype)
        return gradient, None, None, None, None


def full_divergence(
    student: Tensor, teacher: Tensor, alpha: float, *, group: ProcessGroup | None, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen–Shannon divergence of the teacher q and the student p over the whole vocabulary.

    student, teacher [T, v] logits, both divided by the temperature here → [T] fp32, nats; differentiable in the
    student. α = 0: KL(q‖p); α = 1: KL(p‖q); between: α·KL(q‖m) + (1−α)·KL(p‖m), m = (1−α)·p + α·q (SDPO's divergence;
    algorithm of SRPO §2.2).
    """
    return _FullDivergence.apply(student, teacher.detach(), alpha, group, 1 / temperature)
