"""Megatron shards → (Hugging Face name, full tensor), in the same order on every rank, with bounded memory.

stage 0            stage 1                            every rank
embed, layers 0…   layers …, norm, head    ─►  bucket: broadcast the owner stage's shards over the pipeline,
                                                        gather them over tensor parallel ranks, undo the split

Buckets of experts are gathered over all ranks that share a stage's experts: what stands at the same place on each of
them is one expert's shard, or another expert's.

While the consumer has one bucket, the next is on its way:

    gathered    │ 0 │ 1 │ 2 │ 3 │
    consumed        │ 0 │ 1 │ 2 │ 3 │
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_srpo.bridge.buffers import Buffers
from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.table import Mapped, weight_table
from megatron_srpo.core.records import ModelShards

ALIGNMENT = 16  # bytes; every tensor in a flat buffer starts at a multiple, so that it can be viewed in its dtype
DEFAULT_BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Part:
    """One Megatron parameter: its shard's place in the export."""

    name: str
    stage: int  # the pipeline stage that has it
    shape: tuple[int, ...]  # of the shard
    dtype: torch.dtype  # in which it is exported
    mapped: tuple[Mapped, ...]  # on each expert-parallel rank; one where all have the same
    copies: int  # ranks over which it is gathered

    @property
    def nbytes(self) -> int:
        """Bytes of the shard in a flat buffer, alignment included."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def expert(self) -> bool:
        """Whether it belongs to an expert."""
        return self.mapped[0].expert is not None


class Exporter:
    """Exports a model again and again. Making one is collective over the pipeline group, and so is every export.

    `shards` is read at export time: it must hold the live parameters. `bucket_bytes` bounds the full tensors that are
    gathered at once; a larger tensor is a bucket of its own. Beyond the model, an export holds at most two buckets, one
    that is consumed and one that is on its way, this rank's part of each, and the full tensors of one parameter, and on
    a CPU it keeps the memory of the buckets for the next.
    `dtype` converts on the way (None: as is).
    """

    def __init__(
        self, shards: ModelShards, hf_config: Mapping[str, Any], *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if bucket_bytes <= 0:
            raise BridgeError(f"bucket_bytes is {bucket_bytes}: expected a positive number of bytes")
        self._shards = shards
        self._table = weight_table(hf_config, shards.padded_vocab_size)
        self._buckets = _buckets(self._parts(dtype), bucket_bytes)
        device = next((parameter.device for parameter in shards.parameters.values()), torch.device("cpu"))
        self._shards_memory, self._full_memory = Buffers(device), Buffers(device)

    def _parts(self, dtype: torch.dtype | None) -> list[Part]:
        """All parameters of the model, by stage, then in the stage's own order; the same list on every rank."""
        shards = self._shards
        mine = [(name, tuple(p.shape), dtype or p.dtype) for name, p in shards.parameters.items()]
        stages = [mine]
        if shards.pp_size > 1:
            stages = [None] * shards.pp_size
            dist.all_gather_object(stages, mine, group=shards.pp_group)
        parts = []
        for stage, found in enumerate(stages):
            for name, shape, kind in found:
                mapped = self._table.over_expert_ranks(name, shards.ep_size)
                copies = shards.tp_size if mapped[0].expert is None else shards.ep_size * shards.etp_size
                parts.append(Part(name, stage, shape, kind, mapped, copies))
        return [part for part in parts if part.mapped[0].exported]

    def names(self) -> list[str]:
        """The Hugging Face names, in the order of `items`."""
        parts = [part for bucket in self._buckets for part in bucket]
        return [name for part in parts for mapped in part.mapped for name in mapped.hf_names]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A new export; see `items`."""
        return self.items()

    @torch.no_grad()
    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) on the device of the parameters; every rank must drain it.

        A tensor is never overwritten by the exporter, but where this rank has the whole of it, it may be a view of the
        parameter and change with it: use it before the next optimiser step, or copy it. It may keep its whole bucket
        alive.
        """
        on_the_way = None
        for bucket, following in itertools.zip_longest(self._buckets, self._buckets[1:]):
            gathered = (on_the_way or self._start(bucket))()
            on_the_way = None
            for named in _full(bucket, gathered):
                yield named
                if following and on_the_way is None:  # now the consumer has let go of the bucket before
                    on_the_way = self._start(following)
            del gathered, named

    def _start(self, bucket: list[Part]) -> Callable[[], list[list[torch.Tensor]]]:
        """Start the exchange of a bucket. The result waits for it: for each part, the shards of all ranks that share
        it. Bytes travel, so that any dtype does, bit for bit."""
        shards = self._shards
        if bucket[0].copies == 1 and shards.pp_size == 1:
            return lambda: [[shards.parameters[part.name].detach().to(part.dtype)] for part in bucket]
        copies, group = bucket[0].copies, shards.expert_group if bucket[0].expert else shards.tp_group
        stage, size = bucket[0].stage, sum(part.nbytes for part in bucket)
        held = [shards.parameters[part.name].detach() for part in bucket] if stage == shards.pp_rank else []
        if len(held) == 1 and held[0].nbytes == size and held[0].dtype == bucket[0].dtype and held[0].is_contiguous():
            flat = held[0].view(-1).view(torch.uint8)  # as it stands, without a copy
        else:
            flat = self._shards_memory.take(size)
            for parameter, view in zip(held, _views(flat, bucket), strict=False):  # none of another stage's
                view.copy_(parameter)
        work, full = None, flat
        if shards.pp_size > 1:
            source = dist.get_global_rank(shards.pp_group, stage)
            work = dist.broadcast(flat, source, group=shards.pp_group, async_op=True)
        if copies > 1:
            if work is not None:
                work.wait()  # with NCCL the stream waits; with gloo this process does, and the gather alone overlaps
            full = self._full_memory.take(copies * size)
            work = dist.all_gather_into_tensor(full, flat, group=group, async_op=True)

        def finish() -> list[list[torch.Tensor]]:
            work.wait()
            by_rank = [_views(mine, bucket) for mine in full.chunk(copies)]
            return [list(parts) for parts in zip(*by_rank, strict=True)]

        return finish


def _full(bucket: list[Part], gathered: list[list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The full tensors of a bucket by their Hugging Face names, from the shards of each of its parts."""
    for part, parts in zip(bucket, gathered, strict=True):
        split = part.copies // len(part.mapped)  # ranks that share one expert, or the layer
        for i, mapped in enumerate(part.mapped):
            full = mapped.rule.from_shards(parts[i * split : (i + 1) * split])
            yield from zip(mapped.hf_names, full, strict=True)


def _views(flat: torch.Tensor, bucket: list[Part]) -> list[torch.Tensor]:
    """The bucket's shards as views of a flat byte buffer."""
    views, start = [], 0
    for part in bucket:
        used = math.prod(part.shape) * part.dtype.itemsize
        views.append(flat[start : start + used].view(part.dtype).view(part.shape))
        start += part.nbytes
    return views


def _buckets(parts: list[Part], bucket_bytes: int) -> list[list[Part]]:
    """Consecutive parts of one stage, experts' or others, up to `bucket_bytes` when gathered, at least one part."""
    buckets: list[list[Part]] = []
    filled = 0
    for part in parts:
        before = buckets[-1][-1] if buckets else None
        together = before is not None and (before.stage, before.expert) == (part.stage, part.expert)
        if not together or filled + part.nbytes * part.copies > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(part)
        filled += part.nbytes * part.copies
    return buckets


def export_hf(
    shards: ModelShards, hf_config: Mapping[str, Any], *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES, dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """One export; see `Exporter`, which saves the planning when there are several."""
    return Exporter(shards, hf_config, bucket_bytes=bucket_bytes, dtype=dtype).items()
