"""Samples → packed rows: who forwards what, in which row, and the rows as tensors.

`plan_batch` decides (pure, no tensors); `pack_rows` builds the rows of a pass; `response_spans` says where in a row the
responses are. Shapes: T tokens of a row, R response tokens of a sample, K top-k, v vocabulary shard.

    row      │ prompt 0 │ response 0 │ prompt 1 │ response 1 │ padding │
    predicts            └─ from the last prompt token to the last but one of the response

Under context parallelism every sequence is filled up to a multiple as well (`Padding`).
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import BatchPlan, MiniBatchPlan, PackedBatch, Padding, RoutedSample, Row, TokenScores

# Cost of a sequence of n tokens: n + n²/ATTENTION_LENGTH, in units of one token's matrix products. A layer needs about
# 24·H² operations a token and 2·H·n for its causal attention: they are equal at n = 12·H, H = 4096 here.
ATTENTION_LENGTH = 12 * 4096
TRAIN_PASSES = 3  # forward and a backward of twice its work
NO_PADDING = Padding()


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_batch(
    samples: Sequence[RoutedSample], *, dp_size: int, max_tokens: int, prompts_per_mini_batch: int = 0,
    padding: Padding = NO_PADDING, seed: int = 0, drop_zero_advantage: bool = False,
) -> BatchPlan:  # fmt: skip
    """Which rank forwards which samples in which rows, for every optimiser step of the iteration.

    Groups go to mini-batches whole, `prompts_per_mini_batch` of them each (0: all; the last may have fewer), in an
    order drawn from `seed` when there are several. No padded row exceeds `max_tokens`, in any pass. Samples that do
    not count get no row; with `drop_zero_advantage` neither do those without any gradient (no distillation, advantage
    0: wrong to drop when a KL or entropy term is on), which stay in the denominator. Raises UserError for a sample
    that does not fit.
    """
    budget = max_tokens - max_tokens % padding.row
    _require_fit(samples, budget, max_tokens, padding)
    packer = _Packer(samples, dp_size, budget, padding, drop_zero_advantage)
    mini_batches = [packer.plan(indices) for indices in _mini_batches(samples, prompts_per_mini_batch, seed)]
    return BatchPlan(
        mini_batches=mini_batches,
        efficiency=_efficiency(mini_batches, samples, padding),
        imbalance=packer.slowest / packer.mean - 1.0 if packer.mean else 0.0,
    )


def sample_cost(sample: RoutedSample) -> float:
    """Work for one sample in all passes of the iteration, in token forwards: training, and where it is distilled the
    teacher's score and the student's top-k."""
    student = _sequence_cost(sample.student_length)
    scoring = _sequence_cost(sample.teacher_length) + student if sample.distill_weight > 0 else 0.0
    return TRAIN_PASSES * student + scoring


def _sequence_cost(length: int) -> float:
    return length + length * length / ATTENTION_LENGTH


def _require_fit(samples: Sequence[RoutedSample], budget: int, max_tokens: int, padding: Padding) -> None:
    counted = [sample for sample in samples if sample.counted]
    for sample in counted:
        assert sample.prompt_ids, f"{sample.uid}: an empty prompt cannot predict the first response token"
        assert (sample.teacher_ids is not None) == (sample.distill_weight > 0), "teacher_ids if and only if distilled"
        assert len(sample.rollout_logprobs) == len(sample.response_ids), "one engine log-prob a response token"
    needed = {id(s): padded_length(max(s.student_length, s.teacher_length), padding.sequence) for s in counted}
    too_long = [sample for sample in counted if needed[id(sample)] > budget]
    if not too_long:
        return
    worst = max(too_long, key=lambda sample: needed[id(sample)])
    longest = needed[id(worst)]
    teacher = f", {worst.teacher_length} tokens with the teacher's prompt" if worst.teacher_ids is not None else ""
    usable = f" ({budget} usable, as rows are padded to a multiple)" if budget != max_tokens else ""
    raise UserError(
        f"{len(too_long)} of {len(samples)} samples do not fit into a packed row; the longest is prompt {worst.uid}, "
        f"sample {worst.sample}: {worst.student_length} tokens with its response{teacher}. "
        f"train.max_tokens_per_gpu × parallel.context_parallel_size is {max_tokens}{usable}: raise it to at least "
        f"{longest + max_tokens - budget}, or lower data.max_prompt_length, rollout.max_response_length or "
        "teacher.max_prompt_length"
    )


def _mini_batches(samples: Sequence[RoutedSample], prompts: int, seed: int) -> list[list[int]]:
    """Indices of the samples of each mini-batch; whole groups."""
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(index)
    order = sorted(groups)
    size = prompts or max(1, len(order))
    if size < len(order):
        random.Random(seed).shuffle(order)
    return [
        [index for group in order[start : start + size] for index in groups[group]]
        for start in range(0, len(order), size)
    ]


class _Packer:
    """Plans mini-batches and adds up how long the ranks wait for each other."""

    def __init__(
        self, samples: Sequence[RoutedSample], dp_size: int, budget: int, padding: Padding, drop_zero_advantage: bool
    ) -> None:
        self._samples = samples
        self._dp_size = dp_size
        self._budget = budget
        self._padding = padding
        self._drop = drop_zero_advantage
        self._costs = [sample_cost(sample) for sample in samples]
        self.slowest = self.mean = 0.0  # sums over mini-batches: the ranks meet after each

    def plan(self, indices: Sequence[int]) -> MiniBatchPlan:
        samples = self._samples
        counted = [i for i in indices if samples[i].counted]
        placed = [i for i in counted if not self._drop or samples[i].distill_weight > 0 or samples[i].advantage != 0]
        if counted and not placed:  # one sample is forwarded all the same: the log compares trainer and engine on it
            placed = [min(counted, key=lambda i: samples[i].student_length)]
        loads, ranks = _balance(placed, self._costs, self._dp_size)
        self.slowest += max(loads)
        self.mean += sum(loads) / self._dp_size
        student = [self._rows(rank, lambda i: samples[i].student_length) for rank in ranks]
        # The student's top-k pass uses the teacher's rows, so they must fit under either prompt.
        teacher = [
            self._rows([i for i in rank if samples[i].distill_weight > 0], lambda i: samples[i].teacher_length,
                       lambda i: max(samples[i].teacher_length, samples[i].student_length))
            for rank in ranks
        ]  # fmt: skip
        taught = [i for i in placed if samples[i].distill_weight > 0]
        return MiniBatchPlan(
            student=_even(student, self._padding.rows, at_least=1 if counted else 0),
            teacher=_even(teacher, self._padding.rows, at_least=0),
            loss_tokens=sum(len(samples[i].response_ids) for i in counted),
            distill_tokens=sum(len(samples[i].response_ids) for i in counted if samples[i].distill_weight > 0),
            forwarded={
                "student": _total(student, sum(samples[i].student_length for i in placed)),
                "teacher": _total(teacher, sum(samples[i].teacher_length for i in taught)),
                "topk": _total(teacher, sum(samples[i].student_length for i in taught)),
            },
        )

    def _rows(
        self, indices: Sequence[int], length: Callable[[int], int], room: Callable[[int], int] | None = None
    ) -> list[Row]:
        """Best-fit rows under the budget, the costliest first, so that all ranks' rows of one number are alike."""
        room, multiple = room or length, self._padding.sequence
        bins = _best_fit_decreasing(indices, lambda i: padded_length(room(i), multiple), self._budget)
        bins.sort(key=lambda row: -sum(_sequence_cost(length(i)) for i in row))
        return [Row(tuple(row), sum(length(i) for i in row)) for row in bins]


def _total(rows: list[list[Row]], tokens: int) -> tuple[int, int]:
    return sum(map(len, rows)), tokens


def share_of(samples: Sequence[RoutedSample], plan: BatchPlan, rank: int) -> tuple[list[RoutedSample], BatchPlan]:
    """What data-parallel rank `rank` needs of an iteration: its samples, and the plan with its rows alone, which index
    them. Tokens of other ranks' samples never travel to it."""
    kept = [(mini, mini.student[rank], mini.teacher[rank]) for mini in plan.mini_batches]
    indices = sorted(i for _, student, _ in kept for row in student for i in row.samples)
    place = {index: number for number, index in enumerate(indices)}

    def local(rows: list[Row]) -> list[Row]:
        return [Row(tuple(place[i] for i in row.samples), row.tokens) for row in rows]

    mine = [replace(mini, student=[local(student)], teacher=[local(teacher)]) for mini, student, teacher in kept]
    return [samples[i] for i in indices], replace(plan, mini_batches=mine)


def _balance(indices: Sequence[int], costs: Sequence[float], parts: int) -> tuple[list[float], list[list[int]]]:
    """Longest processing time first: the costliest sample left goes to the least loaded rank. (loads, samples)."""
    heap = [(0.0, rank) for rank in range(parts)]
    result: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(indices, key=lambda i: (-costs[i], i)):
        load, rank = heap[0]
        result[rank].append(index)
        heapq.heapreplace(heap, (load + costs[index], rank))
    return [load for load, _ in sorted(heap, key=lambda entry: entry[1])], result


def _best_fit_decreasing(indices: Sequence[int], size: Callable[[int], int], budget: int) -> list[list[int]]:
    """Bins of at most `budget`: every item, longest first, into the fullest bin that has room."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(indices, key=lambda i: (-size(i), i)):
        need = size(index)
        at = bisect.bisect_left(free, (need, -1))
        if at < len(free):
            room, number = free.pop(at)
        else:
            room, number = budget, len(bins)
            bins.append([])
        bins[number].append(index)
        bisect.insort(free, (room - need, number))
    return bins


def _even(rows: list[list[Row]], multiple: int, *, at_least: int) -> list[list[Row]]:
    """The same number of rows on every rank: those with fewer get empty ones, or the ranks would deadlock."""
    count = math.ceil(max(at_least, *(len(mine) for mine in rows)) / multiple) * multiple
    return [mine + [Row((), 0)] * (count - len(mine)) for mine in rows]


def padded_length(tokens: int, multiple: int) -> int:
    """The next multiple, and at least one."""
    return max(1, math.ceil(tokens / multiple)) * multiple


def _efficiency(mini_batches: Sequence[MiniBatchPlan], samples: Sequence[RoutedSample], padding: Padding) -> float:
    """Useful ÷ computed tokens of all passes; padding and empty rows are computed for nothing."""
    useful = computed = 0
    for mini in mini_batches:
        for teacher, ranks in ((False, mini.student), (True, mini.teacher)):
            for rows in filter(None, ranks):
                useful += sum(row.tokens for row in rows)
                computed += sum(row_lengths(rows, samples, padding=padding, teacher=teacher))
    return useful / computed if computed else 1.0


# ---- the rows --------------------------------------------------------------------------------------------------------


def row_lengths(
    rows: Sequence[Row], samples: Sequence[RoutedSample], *, padding: Padding = NO_PADDING, teacher: bool = False
) -> list[int]:
    """Positions of each packed row of one pass on one data-parallel rank."""
    used = [sum(_sequence_lengths(row, samples, padding, teacher)) for row in rows]
    lengths = [padded_length(tokens, padding.row) for tokens in used]
    return [max(lengths)] * len(lengths) if padding.rows > 1 and lengths else lengths


def response_spans(
    row: Row, samples: Sequence[RoutedSample], *, padding: Padding = NO_PADDING, teacher: bool = False
) -> list[tuple[int, int, int]]:
    """(sample index, start, stop) for every sample of the row, in order: logits at positions start … stop − 1 predict
    its response tokens. For a sequence at offset o with prompt length P and R response tokens: o + P − 1, and R of
    them. `teacher`: the row holds the teacher's prompts."""
    spans, offset = [], 0
    for index, length in zip(row.samples, _sequence_lengths(row, samples, padding, teacher), strict=True):
        start = offset + len(_prompt(samples[index], teacher)) - 1
        spans.append((index, start, start + len(samples[index].response_ids)))
        offset += length
    return spans


def pack_rows(
    rows: Sequence[Row], samples: Sequence[RoutedSample], scores: Sequence[TokenScores | None] | None = None, *,
    padding: Padding = NO_PADDING, teacher: bool = False,
) -> list[PackedBatch]:  # fmt: skip
    """The rows of one pass on one rank, with the students' own prompts or the teacher's, and what `scores` (one a
    sample of the iteration) has for them. A teacher's row has the same response tokens, so position by position what
    the student's row has at its response positions, the student's top-k ids included."""
    lengths = row_lengths(rows, samples, padding=padding, teacher=teacher)
    return [
        _pack(row, samples, scores, padding, length, teacher=teacher) for row, length in zip(rows, lengths, strict=True)
    ]


def _sequence_lengths(row: Row, samples: Sequence[RoutedSample], padding: Padding, teacher: bool) -> list[int]:
    """Positions that each sample takes in the row."""
    lengths = [len(_prompt(samples[i], teacher)) + len(samples[i].response_ids) for i in row.samples]
    return [padded_length(length, padding.sequence) for length in lengths]


def _prompt(sample: RoutedSample, teacher: bool) -> list[int]:
    if not teacher:
        return sample.prompt_ids
    assert sample.teacher_ids is not None, f"{sample.uid} sample {sample.sample} has no teacher prompt"
    return sample.teacher_ids


@dataclass(frozen=True)
class _Layout:
    """Where things are in a row. S sequences; R_all response tokens of all samples, in order."""

    total: int  # T
    samples: list[RoutedSample]
    responses: list[int]  # response lengths, by sample
    positions: torch.Tensor  # [R_all], positions that predict a response token

    def spread(self, values: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """[R_all, …] → [T, …], `fill` where no response token is predicted."""
        result = torch.full((self.total, *values.shape[1:]), fill, dtype=values.dtype)
        result[self.positions] = values
        return result

    def first(self, values: Sequence[float]) -> torch.Tensor:
        """One number a sample, at the position that predicts its first response token; [T] fp32, 0 elsewhere."""
        lengths = torch.tensor(self.responses, dtype=torch.long)
        starts = (lengths.cumsum(0) - lengths)[lengths > 0]
        result = torch.zeros(self.total)
        result[self.positions[starts]] = torch.tensor(values, dtype=torch.float32)[lengths > 0]
        return result

    def per_sample(self, values: Sequence[float]) -> torch.Tensor:
        """One number a sample → [T] fp32."""
        each = torch.tensor(values, dtype=torch.float32)
        return self.spread(each.repeat_interleave(torch.tensor(self.responses, dtype=torch.long)))


def _pack(
    row: Row, samples: Sequence[RoutedSample], scores: Sequence[TokenScores | None] | None, padding: Padding,
    total: int, *, teacher: bool,
) -> PackedBatch:  # fmt: skip
    mine = [samples[index] for index in row.samples]
    lengths = _sequence_lengths(row, samples, padding, teacher)
    ids = np.zeros(total, dtype=np.int64)  # causal attention: what stands behind a sequence changes nothing in it
    for sample, start in zip(mine, itertools.accumulate(lengths, initial=0), strict=False):
        prompt = _prompt(sample, teacher)
        ids[start : start + len(prompt)] = prompt
        ids[start + len(prompt) : start + len(prompt) + len(sample.response_ids)] = sample.response_ids
    if total > sum(lengths):
        lengths.append(total - sum(lengths))  # a sequence of its own: attention stays inside it
    sizes = torch.tensor(lengths, dtype=torch.long)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    spans = response_spans(row, samples, padding=padding, teacher=teacher)
    layout = _Layout(
        total, mine, [stop - start for _, start, stop in spans],
        torch.cat([torch.arange(start, stop) for _, start, stop in spans] or [torch.zeros(0, dtype=torch.long)]),
    )  # fmt: skip
    responses = _joined([sample.response_ids for sample in mine], np.int64)
    engine = _joined([sample.rollout_logprobs for sample in mine], np.float32)
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        targets=layout.spread(responses),
        position_ids=torch.arange(total) - boundaries[:-1].repeat_interleave(sizes),
        cu_seqlens=boundaries.to(torch.int32),
        loss_mask=layout.per_sample([float(sample.counted) for sample in mine]),
        advantages=layout.per_sample([sample.advantage for sample in mine]),
        policy_weight=layout.per_sample([sample.policy_weight for sample in mine]),
        distill_weight=layout.per_sample([sample.distill_weight for sample in mine]),
        rollout_logprobs=layout.spread(engine),
        first_token=layout.first([float(sample.counted) for sample in mine]),
        **_scored(row, scores, layout),
    )


def _joined(values: Sequence[Sequence[float]], dtype: Any) -> torch.Tensor:
    """One after the other, [Σ lengths]."""
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=dtype) for part in values] or [np.zeros(0, dtype)]))


def _scored(row: Row, scores: Sequence[TokenScores | None] | None, layout: _Layout) -> dict[str, torch.Tensor | None]:
    """The fields of a row that come from scoring passes; None where there was no such pass."""
    if scores is None:
        return {}
    mine = [scores[index] or TokenScores() for index in row.samples]
    by_name = {f.name: [getattr(score, f.name) for score in mine] for f in fields(TokenScores)}
    width = next((value.shape[1] for value in by_name["teacher_logprobs"] if value is not None), 0)
    # Samples that are not distilled have no teacher: their teacher holds equal mass on each of the K ids and on the
    # tail. That is a distribution, so what a loss computes from it before it is masked stays finite.
    fill = -math.log(width + 1)
    return {
        "old_logprobs": _gather(by_name["logprob"], layout, every_sample=True),
        # A KL term asks every row, also one without samples on a rank that has fewer than the others.
        "reference_logprobs": _gather(by_name["reference_logprob"], layout, every_sample=True)
        if mine
        else layout.spread(torch.zeros(0)),
        "topk_ids": _gather(by_name["topk_ids"], layout),
        "teacher_logprobs": _gather(by_name["teacher_logprobs"], layout, fill=fill),
        "teacher_logits": _gather(by_name["teacher_logits"], layout),
        "teacher_entropy": _gather(by_name["teacher_entropy"], layout),
        "initial_hidden": _gather(by_name["initial_hidden"], layout),
    }


def _gather(
    values: Sequence[torch.Tensor | None], layout: _Layout, *, fill: float = 0, every_sample: bool = False
) -> torch.Tensor | None:
    """One field of the samples' scores, [R, …] each → [T, …]; None if no sample has it. All samples have it, or with
    `every_sample` off all distilled ones."""
    known = next((value for value in values if value is not None), None)
    if known is None:
        return None
    parts = []
    for value, sample, length in zip(values, layout.samples, layout.responses, strict=True):
        if value is None:
            assert not every_sample and sample.distill_weight == 0, f"{sample.uid} sample {sample.sample}: no score"
            value = torch.full((length, *known.shape[1:]), fill, dtype=known.dtype)
        assert len(value) == length, f"{sample.uid} sample {sample.sample}: {len(value)} scores, {length} tokens"
        parts.append(value.cpu())
    return layout.spread(torch.cat(parts), fill)
