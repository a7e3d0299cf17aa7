"""Samples → plan: who forwards which samples, in which row, for every optimizer step. Pure, no tensors."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megatron_srpo.batching.rows import NO_PADDING, padded_length, room_of, row_lengths, spans_of, tokens_of
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import BatchPlan, MiniBatchPlan, Padding, Row, Sample, StreamName

# Cost of a sequence of n tokens: n + n²/ATTENTION_LENGTH, in units of one token's matrix products. A layer needs about
# 24·H² operations a token and 2·H·n for its causal attention: they are equal at n = 12·H, H = 4096 here.
ATTENTION_LENGTH = 12 * 4096
TRAIN_PASSES = 3  # forward and a backward of twice its work
WORTH_SPLITTING = 0.01  # share of the slowest rank's work that splitting up the samples of a prompt must save


def plan_batch(
    groups: Sequence[Sequence[Sample]], *, dp_size: int, max_tokens: int, prompts_per_mini_batch: int = 0,
    padding: Padding = NO_PADDING, seed: int = 0, drop_zero_gradient: bool = False,
) -> BatchPlan:  # fmt: skip
    """Which rank forwards which samples in which rows, for every optimizer step of the iteration.

    `groups`: the samples of each prompt; rows index all samples, group after group. Groups go to mini-batches whole,
    `prompts_per_mini_batch` of them each (0: all; the last may have fewer), in an order drawn from `seed` when there
    are several mini-batches. No padded row exceeds `max_tokens`, in any pass. Samples that do not count get no row;
    with `drop_zero_gradient` neither do those that no loss term gives a gradient, which stay in the denominator. Raises
    UserError for a sample that does not fit.
    """
    samples = [sample for group in groups for sample in group]
    budget = max_tokens - max_tokens % padding.row
    _require_fit(samples, budget, max_tokens, padding)
    packer = _Packer(samples, dp_size, budget, padding, drop_zero_gradient)
    mini_batches = [packer.plan(indices) for indices in _mini_batches(groups, prompts_per_mini_batch, seed)]
    return BatchPlan(
        mini_batches=mini_batches,
        efficiency=_efficiency(mini_batches, samples, padding),
        imbalance=packer.slowest / packer.mean - 1.0 if packer.mean else 0.0,
    )


def cost(indices: Sequence[int], samples: Sequence[Sample], padding: Padding) -> float:
    """Work for some samples of one prompt in all passes of the iteration, in token forwards: training, and for those
    that are taught the teacher's score. (A pass of the student's for top-k ids is rare, and one for old log-probs is in
    proportion to the training.)"""
    taught = [i for i in indices if samples[i].teacher is not None]
    work = TRAIN_PASSES * _stream_cost(indices, samples, padding, "student")
    if taught:
        work += _stream_cost(taught, samples, padding, "teacher")
        work += _stream_cost([i for i in taught if samples[i].contrast is not None], samples, padding, "contrast")
    return work


def _stream_cost(indices: Sequence[int], samples: Sequence[Sample], padding: Padding, stream: StreamName) -> float:
    """Work for a pass over one stream of these samples; what they share costs once."""
    if not padding.shares or len(indices) < 2:
        return sum([_sequence_cost(samples[i].length_of(stream)) for i in indices])
    return sum(
        _sequence_cost(before + own) - _sequence_cost(before)
        for before, own in spans_of(indices, samples, padding, stream)
    )


def _longest(sample: Sample) -> int:
    """Tokens of its longest stream: every row that holds the sample has room for any of them."""
    return max(sample.student_length, sample.teacher_length, sample.contrast_length)


def _sequence_cost(length: int) -> float:
    return length + length * length / ATTENTION_LENGTH


def _require_fit(samples: Sequence[Sample], budget: int, max_tokens: int, padding: Padding) -> None:
    counted = [sample for sample in samples if sample.counted]
    for sample in counted:
        assert sample.student.trained_tokens == sample.length, "one engine log-prob for each trained token"
        teacher = sample.teacher
        same = teacher is None or teacher.trained is sample.student.trained or teacher.trained_tokens == sample.length
        assert same, "the teacher has the same tokens"
        assert sample.teacher is not None or not {"distill", "guided"} & set(sample.weights), "both need a teacher"
    if padded_length(max(map(_longest, counted), default=0), padding.sequence) <= budget:
        return
    needed = {id(sample): padded_length(_longest(sample), padding.sequence) for sample in counted}
    too_long = [sample for sample in counted if needed[id(sample)] > budget]
    worst = max(too_long, key=lambda sample: needed[id(sample)])
    longest = needed[id(worst)]
    taught = f", {worst.teacher_length} tokens with the teacher's prompt" if worst.teacher is not None else ""
    usable = f" ({budget} usable, as rows are padded to a multiple)" if budget != max_tokens else ""
    raise UserError(
        f"{len(too_long)} of {len(samples)} samples do not fit into a packed row; the longest is prompt {worst.uid}, "
        f"sample {worst.sample}: {worst.student_length} tokens with its response{taught}. "
        f"train.max_tokens_per_gpu × parallel.context_parallel_size is {max_tokens}{usable}: raise it to at least "
        f"{longest + max_tokens - budget}, or lower data.max_prompt_length, rollout.max_response_length or "
        "teacher.max_prompt_length"
    )


def _mini_batches(groups: Sequence[Sequence[Sample]], prompts: int, seed: int) -> list[list[int]]:
    """Indices of the samples of each mini-batch; whole groups."""
    starts = list(itertools.accumulate((len(group) for group in groups), initial=0))
    order = list(range(len(groups)))
    size = prompts or max(1, len(order))
    if size < len(order):
        random.Random(seed).shuffle(order)
    return [
        [index for group in order[start : start + size] for index in range(starts[group], starts[group + 1])]
        for start in range(0, len(order), size)
    ]


class _Packer:
    """Plans mini-batches and adds up how long the ranks wait for each other."""

    def __init__(
        self, samples: Sequence[Sample], dp_size: int, budget: int, padding: Padding, drop_zero_gradient: bool
    ) -> None:
        self._samples = samples
        self._dp_size = dp_size
        self._budget = budget
        self._padding = padding
        self._drop = drop_zero_gradient
        self._contrasts = any(sample.contrast is not None for sample in samples)
        self.slowest = self.mean = 0.0  # sums over mini-batches: the ranks meet after each

    def plan(self, indices: Sequence[int]) -> MiniBatchPlan:
        samples = self._samples
        counted = [i for i in indices if samples[i].counted]
        placed = [i for i in counted if not self._drop or samples[i].has_gradient]
        if counted and not placed:  # one sample is forwarded all the same: the log compares trainer and engine on it
            placed = [min(counted, key=lambda i: samples[i].student_length)]
        loads, ranks = self._balanced(placed)
        self.slowest += max(loads)
        self.mean += sum(loads) / self._dp_size
        student = [self._rows(rank, "student") for rank in ranks]
        # The other passes over taught samples use the teacher's rows, so every stream must fit.
        others: list[StreamName] = ["student", "contrast"] if self._contrasts else ["student"]
        teacher = [self._rows([i for i in rank if samples[i].teacher is not None], "teacher", others) for rank in ranks]
        return MiniBatchPlan(
            student=_even(student, self._padding.rows, at_least=1 if counted else 0),
            teacher=_even(teacher, self._padding.rows, at_least=0),
            loss_tokens=sum(samples[i].length for i in counted),
            distill_tokens=sum(samples[i].distilled for i in counted),
            responses=sum(samples[i].length > 0 and samples[i].part == 0 for i in counted),
            forwarded={
                "student": self._forwarded(student),
                "teacher": self._forwarded(teacher),
                "distilled": self._forwarded(teacher, "student"),
                "contrast": self._forwarded(teacher, "contrast"),
            },
        )

    def _balanced(self, indices: Sequence[int]) -> tuple[list[float], list[list[int]]]:
        """Loads and samples of the ranks. Samples that share a prompt stay together unless splitting them up balances
        the ranks better than the shared tokens save."""
        families = list(self._families(indices).values())
        best: tuple[list[float], list[list[int]]] | None = None
        largest = max(map(len, families), default=1)
        for parts in _halvings(largest) if self._dp_size > 1 else (1,):
            units = [family[k::parts] for family in families for k in range(min(parts, len(family)))]
            costs = [cost(unit, self._samples, self._padding) for unit in units]
            loads, ranks = _balance(range(len(units)), costs, self._dp_size)
            if best is None or max(loads) < (1 - WORTH_SPLITTING) * max(best[0]):
                best = loads, [[i for unit in rank for i in units[unit]] for rank in ranks]
        assert best is not None
        return best

    def _families(self, indices: Sequence[int]) -> dict[str | int, list[int]]:
        """The samples of each group, in order, which share what their prompts have in common; each alone where nothing
        is shared."""
        families: dict[str | int, list[int]] = {}
        for i in indices:
            families.setdefault(self._samples[i].uid if self._padding.shares else i, []).append(i)
        return families

    def _rows(self, indices: Sequence[int], stream: StreamName, others: Sequence[StreamName] = ()) -> list[Row]:
        """Best-fit rows under the budget, the costliest first, so that all ranks' rows of one number are alike. The
        samples of a row fit with their `others` streams too."""
        samples, padding = self._samples, self._padding

        def room(members: Sequence[int]) -> int:
            return max(room_of(members, samples, padding=padding, stream=name) for name in (stream, *others))

        units: list[list[int]] = []
        for family in self._families(indices).values():
            units += _cut(_alike_together(family, samples, stream), room, self._budget)
        sizes = [room(unit) for unit in units]
        bins: list[list[int]] = []
        for row in _best_fit_decreasing(range(len(units)), lambda unit: sizes[unit], self._budget):
            together = [i for unit in row for i in units[unit]]
            groups = [samples[units[unit][0]].uid for unit in row]
            # Two parts of a group may share less together than apart, if sharing with more samples does not pay.
            fits = not padding.shares or len(set(groups)) == len(groups) or room(together) <= self._budget
            bins += [together] if fits else [units[unit] for unit in row]
        bins.sort(key=lambda row: -_stream_cost(row, samples, padding, stream))
        return [Row(tuple(row), self._tokens(row, stream)) for row in bins]

    def _tokens(self, indices: Sequence[int], stream: StreamName) -> int:
        return tokens_of(indices, self._samples, padding=replace(self._padding, sequence=1, row=1), stream=stream)

    def _forwarded(self, ranks: list[list[Row]], stream: StreamName | None = None) -> tuple[int, int]:
        """(rows, tokens without padding) of a pass over all ranks' rows; with `stream` it is not the one that the rows
        were made for."""
        rows = [row for rank in ranks for row in rank]
        if stream is None:
            return len(rows), sum(row.tokens for row in rows)
        if stream == "contrast" and not self._contrasts:
            return len(rows), 0
        return len(rows), sum(self._tokens(row.samples, stream) for row in rows)


def _halvings(largest: int) -> Iterator[int]:
    """1, 2, 4, … up to the first that is not smaller than `largest`."""
    parts = 1
    while True:
        yield parts
        if parts >= largest:
            return
        parts *= 2


def _alike_together(family: Sequence[int], samples: Sequence[Sample], stream: StreamName) -> list[int]:
    """The samples of a group, those of one prompt together, the longest first: a family that is cut then loses
    little."""
    first: dict[int, int] = {}
    for i in family:
        first.setdefault(id(samples[i].stream(stream).prompt_ids), i)
    return sorted(
        family,
        key=lambda i: (first[id(samples[i].stream(stream).prompt_ids)], -samples[i].length_of(stream), i),
    )


def _cut(members: list[int], room: Callable[[Sequence[int]], int], budget: int) -> list[list[int]]:
    """The members, in order, in as few parts as fit into rows of their own."""
    if len(members) < 2 or room(members) <= budget:
        return [members] if members else []
    half = len(members) // 2
    return _cut(members[:half], room, budget) + _cut(members[half:], room, budget)


def share_of(samples: Sequence[Sample], plan: BatchPlan, rank: int) -> tuple[list[Sample], BatchPlan]:
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


def _efficiency(mini_batches: Sequence[MiniBatchPlan], samples: Sequence[Sample], padding: Padding) -> float:
    """Useful ÷ computed tokens of all passes; padding and empty rows are computed for nothing."""
    useful = computed = 0
    for mini in mini_batches:
        streams: tuple[tuple[StreamName, list[list[Row]]], ...] = ("student", mini.student), ("teacher", mini.teacher)
        for stream, ranks in streams:
            for rows in filter(None, ranks):
                useful += sum(row.tokens for row in rows)
                if padding.sequence == padding.row == padding.rows == 1:  # the same, at a fraction of the cost
                    computed += sum(padded_length(row.tokens, 1) for row in rows)
                else:
                    computed += sum(row_lengths(rows, samples, padding=padding, stream=stream))
    return useful / computed if computed else 1.0
