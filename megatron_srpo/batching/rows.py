"""Plan → rows: the packed rows of a pass as tensors, and where in a row the trained tokens are.

    row       │ prompt 0 │ response 0 │ prompt 1 │ response 1 │ padding │
    predicts            └─ the token before each trained token ─┘

Samples of one group whose prompts begin alike share what is equal (`Padding.shares`, batching/prefixes.py). A prompt's
last token, which predicts the first token of the response, stays with each sample, so that every position predicts one
token at most. Prompts that differ from some token on share what stands before it, so a row is a set of trees:

    row       │ prompt but its last token │ last, response 0 │ last, response 1 │ … │
    row       │ question │ demonstration a │ last, response 0 │ last, response 1 │ demonstration b │ last, …

Shapes: T tokens of a row, R trained tokens of a sample, K top-k, v vocabulary shard. Under context parallelism every
sequence is filled up to a multiple as well (`Padding`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.batching.prefixes import prefixes_of
from megatron_srpo.core.records import Experts, Padding, PerToken, Row, Sample, StreamName
from megatron_srpo.core.tensors import SCORE_NAMES, PackedBatch, Scores, chain_of

NO_PADDING = Padding()
KEYS_A_TOKEN = 8  # that attention may copy for each token of a row's budget: see room_of
FOR_EVERY_SAMPLE = ("logprob", "reference_logprob")  # scores that only a pass over all samples can have made


def padded_length(tokens: int, multiple: int) -> int:
    """The next multiple, and at least one."""
    return max(1, -(-tokens // multiple)) * multiple


def row_lengths(
    rows: Sequence[Row], samples: Sequence[Sample], *, padding: Padding = NO_PADDING, stream: StreamName = "student"
) -> list[int]:
    """Positions of each packed row of one pass on one data-parallel rank."""
    used = [tokens_of(row.samples, samples, padding=padding, stream=stream) for row in rows]
    lengths = [padded_length(tokens, padding.row) for tokens in used]
    return [max(lengths)] * len(lengths) if padding.rows > 1 and lengths else lengths


def predicting_positions(
    row: Row, samples: Sequence[Sample], *, padding: Padding = NO_PADDING, stream: StreamName = "student"
) -> list[tuple[int, Tensor]]:
    """(sample index, [R] positions) for every sample of the row, in order: the logits at these positions predict its
    trained tokens. `stream`: which of the samples' streams the row holds."""
    return [
        (sequence.sample, torch.from_numpy(samples[sequence.sample].stream(stream).targets + (sequence.origin - 1)))
        for sequence in _sequences(row.samples, samples, padding, stream)
        if sequence.is_sample
    ]


def tokens_of(
    indices: Sequence[int], samples: Sequence[Sample], *, padding: Padding = NO_PADDING, stream: StreamName = "student"
) -> int:
    """Positions that these samples take in one row, without the padding at its end."""
    if not padding.shares:  # the same, at a fraction of the cost
        lengths = [samples[index].length_of(stream) for index in indices]
        return sum([padded_length(length, padding.sequence) for length in lengths])
    return sum(sequence.length for sequence in _sequences(indices, samples, padding, stream))


def room_of(indices: Sequence[int], samples: Sequence[Sample], *, padding: Padding, stream: StreamName) -> int:
    """What these samples take of a row's token budget: their positions, or the keys that attention copies divided by
    KEYS_A_TOKEN, if that is more. It copies keys and values for every sequence behind a prefix, the prefix's among
    them, and keeps the copies for the backward pass. A key and its value are a ninth (as many key-value heads as heads)
    to a thirtieth (grouped) of what a layer keeps of a token, so the copies at most double what the budget limits."""
    if not padding.shares:
        return tokens_of(indices, samples, padding=padding, stream=stream)
    sequences = _sequences(indices, samples, padding, stream)
    copied = sum(sequence.skipped + sequence.length for sequence in sequences if sequence.prefix >= 0)
    return max(sum(sequence.length for sequence in sequences), copied // KEYS_A_TOKEN)


@dataclass(frozen=True)
class PackedRows(Sequence[PackedBatch]):
    """The rows of one pass on one rank. Each is packed when it is asked for, so that what a step needs of all its
    tokens, their scores above all, does not exist twice."""

    rows: Sequence[Row]
    samples: Sequence[Sample]
    scores: Sequence[Scores] | None
    padding: Padding
    stream: StreamName
    experts: Sequence[Experts | None]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> PackedBatch: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[PackedBatch]: ...

    def __getitem__(self, number: int | slice) -> PackedBatch | Sequence[PackedBatch]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        row = self.rows[number]
        batch = _pack(row, self.samples, self.scores, self.padding, self.lengths[number], self.stream)
        if self.experts:
            batch.experts = _experts(row, self.samples, self.experts, self.padding, len(batch.targets), self.stream)
        return batch


def pack_rows(
    rows: Sequence[Row], samples: Sequence[Sample], scores: Sequence[Scores] | None = None, *,
    padding: Padding = NO_PADDING, stream: StreamName = "student",
    experts: Sequence[Experts | None] = (),
) -> Sequence[PackedBatch]:  # fmt: skip
    """The rows of one pass on one rank, and what `scores` (one for each sample of the iteration) has for them when a
    row is asked for.

    All streams of a sample have the same trained tokens, so a row of teachers' streams carries the same values at them
    as a row of the students' streams, the student's top-k ids included. `experts` (one for each sample, of its student
    stream from the beginning) are to be used again; a row of other streams has those of the response.
    """
    lengths = row_lengths(rows, samples, padding=padding, stream=stream)
    return PackedRows(rows, samples, scores, padding, stream, experts, lengths)


def token_positions(
    row: Row, samples: Sequence[Sample], *, padding: Padding = NO_PADDING, stream: StreamName = "student"
) -> list[tuple[int, Tensor]]:
    """(sample index, [L] positions of all its tokens) for every sample of the row, in order. Shared tokens belong to
    several samples."""
    sequences = _sequences(row.samples, samples, padding, stream)
    ranges = [torch.arange(sequence.start, sequence.start + sequence.tokens) for sequence in sequences]
    return [
        (sequence.sample, torch.cat([ranges[i] for i in chain_of(number, [one.prefix for one in sequences])]))
        for number, sequence in enumerate(sequences)
        if sequence.is_sample
    ]


def _experts(
    row: Row, samples: Sequence[Sample], experts: Sequence[Experts | None], padding: Padding,
    total: int, stream: StreamName,
) -> Tensor | None:  # fmt: skip
    """[T, layers, K] int16, −1 where nothing is known; None if nothing is known of any token."""
    known = [found for index in row.samples if (found := experts[index]) is not None]
    if not known:
        return None
    result = np.full((total, *known[0].shape[1:]), -1, dtype=np.int16)
    for index, positions in token_positions(row, samples, padding=padding, stream=stream):
        found, sample = experts[index], samples[index]
        if found is None:
            continue
        if stream != "student":
            read = sample.stream(stream)
            if not np.array_equal(read.trained, sample.student.trained):  # feedback stands between the turns
                own = sample.student.targets[sample.student.targets < len(found)]
                result[positions[read.targets[: len(own)]].numpy()] = found[own]
                continue
            positions, found = positions[len(read.prompt_ids) :], found[len(sample.student.prompt_ids) :]
        result[positions[: len(found)].numpy()] = found
    return torch.from_numpy(result)


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a row: a sample's stream from token `skipped` on, or tokens of prompts that several samples
    share."""

    sample: int  # index
    start: int  # in the row
    skipped: int  # tokens of the stream that are in the prefix, and in what that goes on behind
    tokens: int
    length: int  # with padding
    prefix: int = -1  # the number of the sequence that it goes on behind
    is_sample: bool = True

    @property
    def origin(self) -> int:
        """Where the stream's first token would be in the row."""
        return self.start - self.skipped


def _sequences(
    indices: Sequence[int], samples: Sequence[Sample], padding: Padding, stream: StreamName
) -> list[_Sequence]:
    """The sequences of a row in order, without the row's padding."""
    chains = prefixes_of(indices, samples, padding, stream) if padding.shares else [()] * len(indices)
    made: dict[object, int] = {}  # by prefix, the number of its sequence
    result: list[_Sequence] = []
    start = 0
    for index, chain in zip(indices, chains, strict=True):
        before, passed = -1, 0
        for prefix, end in chain:
            if prefix not in made:
                made[prefix] = len(result)
                length = end - passed
                result.append(_Sequence(index, start, passed, length, length, before, is_sample=False))
                start += length
            before, passed = made[prefix], end
        tokens = samples[index].length_of(stream) - passed
        length = padded_length(tokens, padding.sequence)
        result.append(_Sequence(index, start, passed, tokens, length, before))
        start += length
    return result


def spans_of(
    indices: Sequence[int], samples: Sequence[Sample], padding: Padding, stream: StreamName
) -> list[tuple[int, int]]:
    """(tokens before it, own tokens) of each sequence of these samples in one row, of shared ones once."""
    return [(one.skipped, one.tokens) for one in _sequences(indices, samples, padding, stream)]


@dataclass(frozen=True)
class _Layout:
    """Where things are in a row. R_all trained tokens of all samples, in order."""

    total: int  # T
    samples: list[Sample]
    positions: Tensor  # [R_all], positions that predict a trained token

    def spread(self, values: Tensor, fill: float = 0) -> Tensor:
        """[R_all, …] → [T, …], `fill` where no trained token is predicted."""
        result = torch.full((self.total, *values.shape[1:]), fill, dtype=values.dtype)
        result[self.positions] = values
        return result

    def per_token(self, values: Sequence[PerToken]) -> Tensor:
        """For each sample one number, or one for each of its trained tokens → [T] fp32."""
        parts = [np.broadcast_to(np.float32(v), s.length) for v, s in zip(values, self.samples, strict=True)]
        return self.spread(torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.float32)])))

    def first_tokens(self) -> Tensor:
        """[T] fp32, 1 at the position that predicts the first trained token of a counted attempt."""
        lengths = torch.tensor([sample.length for sample in self.samples], dtype=torch.long)
        counted = torch.tensor([float(sample.counted and sample.part == 0) for sample in self.samples])
        starts = (lengths.cumsum(0) - lengths)[lengths > 0]
        result = torch.zeros(self.total)
        result[self.positions[starts]] = counted[lengths > 0]
        return result


def _pack(
    row: Row, samples: Sequence[Sample], scores: Sequence[Scores] | None, padding: Padding, total: int,
    stream: StreamName,
) -> PackedBatch:  # fmt: skip
    mine = [samples[index] for index in row.samples]
    sequences = _sequences(row.samples, samples, padding, stream)
    ids = np.zeros(total, dtype=np.int64)  # causal attention: what stands behind a sequence changes nothing in it
    is_padding = np.ones(total, dtype=bool)
    for part in sequences:
        is_padding[part.start : part.start + part.tokens] = False
        ids[part.start : part.start + part.tokens] = (
            samples[part.sample].stream(stream).tokens(part.skipped, part.skipped + part.tokens)
        )
    lengths, prefixes = [part.length for part in sequences], [part.prefix for part in sequences]
    starts = [part.skipped for part in sequences]
    if total > sum(lengths):  # a sequence of its own: attention stays inside it
        lengths.append(total - sum(lengths))
        prefixes.append(-1)
        starts.append(0)
    sizes = torch.tensor(lengths, dtype=torch.long)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    origins = boundaries[:-1] - torch.tensor(starts, dtype=torch.long)
    spans = [found for _, found in predicting_positions(row, samples, padding=padding, stream=stream)]
    layout = _Layout(total, mine, torch.cat([*spans, torch.zeros(0, dtype=torch.long)]))
    trained = [sample.stream(stream).trained_ids for sample in mine]
    targets = np.concatenate([*trained, np.zeros(0, np.int32)]).astype(np.int64)
    names = sorted({name for sample in mine for name in sample.weights})
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        targets=layout.spread(torch.from_numpy(targets)),
        position_ids=torch.arange(total) - origins.repeat_interleave(sizes),
        cu_seqlens=boundaries.to(torch.int32),
        prefixes=tuple(prefixes) if any(prefix >= 0 for prefix in prefixes) else (),
        loss_mask=layout.per_token([float(sample.counted) for sample in mine]),
        advantages=layout.per_token([sample.advantage for sample in mine]),
        rollout_logprobs=layout.per_token([sample.rollout_logprobs for sample in mine]),
        first_token=layout.first_tokens(),
        response_tokens=layout.per_token([float(sample.response_length) for sample in mine]),
        turn=layout.per_token([_turn_numbers(sample) for sample in mine]) if any(s.turns for s in mine) else None,
        weights={name: layout.per_token([sample.weights.get(name, 0.0) for sample in mine]) for name in names},
        scores=Scores() if scores is None else _scored([scores[index] for index in row.samples], layout),
        is_padding=torch.from_numpy(is_padding) if is_padding.any() else None,
    )


def _turn_numbers(sample: Sample) -> PerToken:
    """The number of the turn of each trained token, from 1."""
    numbers = np.arange(sample.first_turn + 1, sample.first_turn + 1 + len(sample.turns), dtype=np.float32)
    return np.repeat(numbers, sample.turns) if sample.turns else 1.0


def is_scored(name: str, sample: Sample) -> bool:
    """Whether passes give a sample this score, a field of Scores."""
    return name in FOR_EVERY_SAMPLE or sample.teacher is not None


def _scored(scores: Sequence[Scores], layout: _Layout) -> Scores:
    """The samples' scores as those of the row; None for passes that none of the samples was in."""
    width = next((score.teacher_logprobs.shape[1] for score in scores if score.teacher_logprobs is not None), 0)
    # Samples without a teacher get equal mass on each of the K ids and on the tail. That is a distribution, so what a
    # loss computes from it before it is masked stays finite.
    fills = {"teacher_logprobs": -math.log(width + 1)}
    row = Scores(
        **{name: _gather(name, [getattr(score, name) for score in scores], layout, fills) for name in SCORE_NAMES}
    )
    if not scores:  # a KL term asks every row, also an empty one on a rank that has fewer samples than the others
        row = dataclasses.replace(row, reference_logprob=layout.spread(torch.zeros(0)))
    return row


def _gather(name: str, values: Sequence[Tensor | None], layout: _Layout, fills: dict[str, float]) -> Tensor | None:
    """One score of the samples, [R, …] each → [T, …]; None if no sample has it."""
    known = next((value for value in values if value is not None), None)
    if known is None:
        return None
    parts = []
    for value, sample in zip(values, layout.samples, strict=True):
        if value is None:
            assert not is_scored(name, sample), f"{sample.uid} sample {sample.sample}: no score {name}"
            value = torch.full((sample.length, *known.shape[1:]), fills.get(name, 0), dtype=known.dtype)
        assert len(value) == sample.length, (
            f"{sample.uid} sample {sample.sample}: {len(value)} scores, {sample.length} tokens"
        )
        parts.append(value.cpu())
    return layout.spread(torch.cat(parts), fills.get(name, 0))
