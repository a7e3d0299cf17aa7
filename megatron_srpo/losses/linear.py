"""The LM head's product joined with the softmax quantities: log-probs and entropy straight from hidden states.

If the logits of a row fit the memory budget, they are computed once, in the model's dtype, and kept. The backward pass,
which can run only once, overwrites them with their gradient. The head then costs three matrix products. If they do not
fit, they are computed in pieces within the budget, and computed again in the backward pass: four products.

Legend: T tokens, H hidden size, v this rank's vocabulary, M ids a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_srpo.losses.vocab_parallel import (
    _local,
    _work_dtype,
    combine_statistics,
    local_candidates,
    local_statistics,
    merge_candidates,
    rows_at_once,
    write_logits_gradient,
)

PRODUCT_BYTES = 32 * 2**20  # of a weight gradient in the model's dtype, on its way into an fp32 one
# Rows of the head that are fetched for one id cost as much as the product with so many rows. On a CPU the two cost the
# same at 80 to 160 rows (hidden sizes 256 and 512).
FETCHED_ROW = 128


def pieces(tokens: int, width: int, itemsize: int, budget_bytes: int) -> list[slice]:
    """Slices of rows of `width` values that fit the budget; one slice where all do."""
    size = max(1, budget_bytes // max(1, width * itemsize))
    return [slice(start, min(tokens, start + size)) for start in range(0, tokens, size)]


class _LinearGatherLogprobs(torch.autograd.Function):
    """`gather_statistics(hidden @ weight.T)`: the same two collectives forward, none backward. With positions `at` [n]
    the k most likely ids of these are asked for too, which takes one gather more; they come last, [T, k]. At the other
    positions the first of `ids` stands in their place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, width: int, vocab_start: int, group: ProcessGroup | None,
        scale: float, budget_bytes: int, k: int, at: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        work, head = _work_dtype(hidden), weight[:width]
        parts = pieces(hidden.size(0), width, hidden.element_size(), budget_bytes)
        columns, here = _local(ids, vocab_start, width)
        mine = torch.empty(hidden.size(0), dtype=work, device=hidden.device)
        sums = torch.zeros(hidden.size(0), 2 + ids.size(1), dtype=work, device=hidden.device)
        logits, candidates = None, []
        for part in parts:
            logits = None  # one piece at a time
            logits = hidden[part] @ head.T
            mine[part] = local_statistics(logits, columns[part], here[part], sums[part], scale)
            if at is not None:
                candidates += [local_candidates(rows, k, vocab_start) for rows in _rows_of(logits, at, part)]
        normaliser, entropy, logprobs = combine_statistics(mine, sums, here, group)
        found = ids.new_zeros(len(ids), 0)
        if at is not None:
            values, best = merge_candidates(torch.cat(candidates), k, group)
            found = ids[:, :1].repeat(1, k).index_copy_(0, at, best)
            known = (scale * values - normaliser[at, None]).to(work)
            logprobs = torch.cat([logprobs, logprobs[:, :1].repeat(1, k).index_copy_(0, at, known)], 1)
            columns, here = _local(torch.cat([ids, found], 1), vocab_start, width)
        kept = logits if len(parts) == 1 and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]) else None
        ctx.save_for_backward(hidden, weight, normaliser, entropy, columns, here, logprobs, kept)
        ctx.width, ctx.scale, ctx.parts = width, scale, parts
        ctx.mark_non_differentiable(normaliser, found)
        return logprobs, entropy, normaliser, found

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden, weight, *known, kept = ctx.saved_tensors
        total = _WeightGradient(weight, ctx.width) if ctx.needs_input_grad[1] else None
        if grad_logprobs is None and grad_entropy is None:
            return (None, total and total.result(), *(None,) * 8)
        head = weight[: ctx.width]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in ctx.parts:
            logits = hidden[part] @ head.T if kept is None else kept
            write_logits_gradient(  # in place: the logits are not needed any more
                logits, logits, *(value[part] for value in known),
                None if grad_logprobs is None else grad_logprobs[part],
                None if grad_entropy is None else grad_entropy[part],
                ctx.scale,
            )  # fmt: skip
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[part])
            if total is not None:
                total.add(logits, hidden[part])
            del logits
        return grad_hidden, None if total is None else total.result(), *(None,) * 8


def _rows_of(logits: Tensor, at: Tensor, part: slice) -> Iterator[Tensor]:
    """Those rows of a piece of the logits that are among the ascending positions `at`: all at once if they are all of
    it, else copies of a few rows at a time."""
    mine = at[(at >= part.start) & (at < part.stop)] - part.start
    if len(mine) == len(logits):
        yield logits
        return
    for rows in mine.split(rows_at_once(logits)):
        yield logits[rows]


class _WeightGradient:
    """Σ dᵀ·h over the pieces in fp32: into `main_grad`, where Megatron's DDP keeps one, else into a tensor of its own.

    With `main_grad` autograd gets nothing, so DDP's hook adds only what other uses of a tied weight give. Or it gets
    zeros: where DDP reduces during the backward pass it waits for a gradient (the weight's `awaited` is set).
    """

    def __init__(self, weight: Tensor, width: int) -> None:
        self._weight = weight
        self._main = getattr(weight, "main_grad", None)
        held = torch.zeros_like(weight, dtype=_work_dtype(weight)) if self._main is None else self._main
        self._sum, self._rows = held, held[:width]

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self._sum.dtype == gradient.dtype:
            self._rows.addmm_(gradient.T, hidden)
        elif gradient.is_cuda:  # cuBLAS adds a bf16 product to fp32 in its epilogue
            torch.addmm(self._rows, gradient.T, hidden, out_dtype=self._sum.dtype, out=self._rows)
        else:
            self._add_in_pieces(gradient, hidden)

    def _add_in_pieces(self, gradient: Tensor, hidden: Tensor) -> None:
        for part in pieces(self._rows.size(0), hidden.size(1), hidden.element_size(), PRODUCT_BYTES):
            self._rows[part] += gradient[:, part].T @ hidden

    def result(self) -> Tensor | None:
        if self._main is None:
            return self._sum.to(self._weight.dtype)
        return torch.zeros_like(self._weight) if getattr(self._weight, "awaited", False) else None


def linear_gather_statistics(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, width: int, vocab_start: int, group: ProcessGroup | None,
    temperature: float = 1.0, budget_bytes: int = 2**30, k: int = 0, at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of softmax(hidden · weightᵀ ÷ temperature), fp32, nats: log-probs at global ids [T, M], the entropy [T], and
    without gradient log Σ exp of the logits ÷ temperature [T].

    With `at`, ascending positions [n], also log-probs at the k most likely ids of these positions, behind the others
    [T, M + k], and the ids, which come last [T, k]; at all other positions `ids[:, 0]` fills both. Without `at` the
    last result is empty.

    hidden [T, H]; weight [≥ width, H], whose first `width` rows are this rank's real vocabulary. The gradient of
    `hidden` is this rank's part: the caller's graph sums it over tensor-parallel ranks. `budget_bytes` limits the
    logits that are in memory at once, in the dtype of `hidden`.
    """
    return _LinearGatherLogprobs.apply(
        hidden, weight, ids, width, vocab_start, group, 1 / temperature, budget_bytes, k, at
    )


@torch.no_grad()
def logprobs_at(
    hidden: Tensor, weight: Tensor, ids: Tensor, normaliser: Tensor, *, width: int, vocab_start: int,
    group: ProcessGroup | None, temperature: float = 1.0, budget_bytes: int = 2**30,
) -> Tensor:  # fmt: skip
    """Log-probs [T, M] at global ids of distributions whose `normaliser` [T], log Σ exp(logit ÷ temperature), is known;
    no gradient. It takes products with M rows of the weight for each token instead of all of them, if the vocabulary is
    large. One SUM over the ranks."""
    columns, here = _local(ids, vocab_start, width)
    found = torch.empty(ids.shape, dtype=_work_dtype(hidden), device=hidden.device)
    fetches = width > FETCHED_ROW * ids.size(1)
    values = ids.size(1) * hidden.size(1) if fetches else width  # for each token, in memory at once
    for part in pieces(len(ids), values, hidden.element_size(), min(budget_bytes, PRODUCT_BYTES)):
        if fetches:
            found[part] = torch.bmm(weight[columns[part]], hidden[part, :, None])[..., 0]
        elif width:
            found[part] = (hidden[part] @ weight[:width].T).gather(1, columns[part])
    found = torch.where(here, found, torch.zeros_like(found))
    if group is not None:
        dist.all_reduce(found, group=group)
    return found / temperature - normaliser[:, None]


def iterate_logits(hidden: Tensor, weight: Tensor, *, width: int, budget_bytes: int) -> Iterator[Tensor]:
    """The logits of consecutive tokens, a piece at a time; without gradient."""
    with torch.no_grad():
        for part in pieces(hidden.size(0), width, hidden.element_size(), budget_bytes):
            yield hidden[part] @ weight[:width].T
