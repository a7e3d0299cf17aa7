"""Exports Megatron shards as (Hugging Face name, full tensor), in the same order on every rank, in bounded memory.

stage 0            stage 1                            every rank
embed, layers 0…   layers …, norm, head    ─►  bucket: broadcast the owner stage's shards over the pipeline,
                                                        gather them over tensor parallel ranks, undo the split

Buckets of experts are gathered over all ranks that together have a stage's experts. At the same place each of these
ranks has another shard of one expert, or another expert.

While the consumer uses one bucket, the next one is gathered:

    gathered    │ 0 │ 1 │ 2 │ 3 │
    consumed        │ 0 │ 1 │ 2 │ 3 │
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_srpo.bridge.buffers import Buffers
from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.table import Mapped, weight_table
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig

ALIGNMENT = 16  # bytes; every tensor in a flat buffer starts at a multiple, so that it can be viewed in its dtype
DEFAULT_BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ParameterPlan:
    """How one Megatron parameter is exported."""

    name: str
    stage: int  # the pipeline stage that holds it
    shape: tuple[int, ...]  # of the shard
    dtype: torch.dtype  # the dtype in which it is exported
    mapped: tuple[Mapped, ...]  # for each expert-parallel rank; one entry if all hold the same parameter
    copies: int  # number of ranks over which it is gathered

    @property
    def nbytes(self) -> int:
        """Size of the shard in a flat buffer, alignment included, in bytes."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def expert(self) -> bool:
        """Whether it belongs to an expert."""
        return self.mapped[0].expert is not None


class Exporter:
    """Exports a model, as often as needed. Making one is collective over the pipeline group, and so is every export.

    A model with LoRA adapters is exported as it computes: merged into its weights, which stay as they are. For the
    adapters alone give `shards.of_adapters()`.

    `shards` is read at export time: it must hold the live parameters. `bucket_bytes` bounds the size of one gathered
    bucket; a larger tensor is a bucket of its own. In addition to the model an export holds at most two buckets (one
    that is used and one that is being gathered), this rank's part of both, and the full tensors of one parameter. On a
    CPU it keeps the memory of the buckets for the next export. `dtype` converts; None keeps each parameter's dtype.
    """

    def __init__(
        self, shards: ModelShards, hf_config: HfConfig, *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if bucket_bytes <= 0:
            raise BridgeError(f"bucket_bytes is {bucket_bytes}: expected a positive number of bytes")
        self._shards = shards
        self._table = weight_table(hf_config, shards.padded_vocab_size)
        self.buckets = _buckets(self._parts(dtype), bucket_bytes)
        device = next((parameter.device for parameter in shards.parameters.values()), torch.device("cpu"))
        self._shards_memory, self._full_memory = Buffers(device), Buffers(device)

    def _parts(self, dtype: torch.dtype | None) -> list[ParameterPlan]:
        """All parameters of the model, stage after stage. The list is the same on every rank."""
        shards = self._shards
        mine = [(name, tuple(p.shape), dtype or p.dtype) for name, p in shards.parameters.items()]
        stages = [mine] * shards.pp_size
        if shards.pp_size > 1:
            dist.all_gather_object(stages, mine, group=shards.pp_group)
        parts = []
        for stage, found in enumerate(stages):
            for name, shape, kind in found:
                mapped = self._table.over_expert_ranks(name, shards.ep_size)
                copies = shards.tp_size if mapped[0].expert is None else shards.ep_size * shards.etp_size
                parts.append(ParameterPlan(name, stage, shape, kind, mapped, copies))
        return [part for part in parts if part.mapped[0].exported]

    def names(self) -> list[str]:
        """The Hugging Face names, in the order of `items`."""
        parts = [part for bucket in self.buckets for part in bucket]
        return [name for part in parts for mapped in part.mapped for name in mapped.hf_names]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Starts a new export; see `items`."""
        return self.items()

    @torch.no_grad()
    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Hugging Face name, full tensor) on the device of the parameters. Every rank must consume all of it.

        The exporter never overwrites a tensor. But if this rank holds the whole parameter, the tensor may be a view of
        it and change with it: use it before the next optimizer step, or copy it. A tensor may keep its whole bucket
        alive.
        """
        gathering = None
        for bucket, following in itertools.zip_longest(self.buckets, self.buckets[1:]):
            gathered = (gathering or self._start(bucket))()
            gathering = None
            for named in _full(bucket, gathered):
                yield named
                if following and gathering is None:  # the consumer no longer uses the bucket before
                    gathering = self._start(following)
            del gathered, named

    def _shard(self, name: str) -> torch.Tensor:
        """This rank's shard of a parameter, with its adapters merged into it if it has any."""
        merged = self._shards.merged.get(name)
        return self._shards.parameters[name].detach() if merged is None else merged()

    def _start(self, bucket: list[ParameterPlan]) -> Callable[[], list[list[torch.Tensor]]]:
        """Start to gather a bucket. The returned function waits for it, and gives for each parameter the shards of all
        ranks that share it. Shards are sent as bytes, so that every dtype arrives bit for bit."""
        shards = self._shards
        if bucket[0].copies == 1 and shards.pp_size == 1:
            return lambda: [[self._shard(part.name).to(part.dtype)] for part in bucket]
        copies, group = bucket[0].copies, shards.expert_group if bucket[0].expert else shards.tp_group
        stage, size = bucket[0].stage, sum(part.nbytes for part in bucket)
        held = bucket if stage == shards.pp_rank else []
        alone = self._shard(held[0].name) if len(held) == 1 else None
        if alone is not None and alone.nbytes == size and alone.dtype == bucket[0].dtype and alone.is_contiguous():
            flat = alone.view(-1).view(torch.uint8)  # without a copy
        else:
            flat = self._shards_memory.take(size)
            for part, view in zip(held, _views(flat, bucket), strict=False):  # `held` is empty on other stages
                view.copy_(self._shard(part.name))
        work: dist.Work | None = None
        full = flat
        if shards.pp_size > 1:
            assert shards.pp_group is not None, "pipeline stages have a group"
            source = dist.get_global_rank(shards.pp_group, stage)
            work = dist.broadcast(flat, source, group=shards.pp_group, async_op=True)
        if copies > 1:
            if work is not None:
                work.wait()  # NCCL: the stream waits. gloo: this process waits, and only the gather overlaps.
            full = self._full_memory.take(copies * size)
            work = dist.all_gather_into_tensor(full, flat, group=group, async_op=True)

        assert work is not None
        last = work

        def finish() -> list[list[torch.Tensor]]:
            last.wait()
            by_rank = [_views(mine, bucket) for mine in full.chunk(copies)]
            return [list(parts) for parts in zip(*by_rank, strict=True)]

        return finish


def _full(bucket: list[ParameterPlan], gathered: list[list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The full tensors of a bucket by their Hugging Face names, from the gathered shards of its parameters."""
    for part, parts in zip(bucket, gathered, strict=True):
        split = part.copies // len(part.mapped)  # the number of ranks that share one expert, or the parameter
        for i, mapped in enumerate(part.mapped):
            full = mapped.rule.from_shards(parts[i * split : (i + 1) * split])
            yield from zip(mapped.hf_names, full, strict=True)


def _views(flat: torch.Tensor, bucket: list[ParameterPlan]) -> list[torch.Tensor]:
    """The bucket's shards, as views of a flat byte buffer."""
    views, start = [], 0
    for part in bucket:
        used = math.prod(part.shape) * part.dtype.itemsize
        views.append(flat[start : start + used].view(part.dtype).view(part.shape))
        start += part.nbytes
    return views


def _buckets(parts: list[ParameterPlan], bucket_bytes: int) -> list[list[ParameterPlan]]:
    """Buckets of consecutive parameters of one stage, of up to `bucket_bytes` when gathered, with at least one
    parameter. A bucket has either experts only or no experts."""
    buckets: list[list[ParameterPlan]] = []
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
    shards: ModelShards, hf_config: HfConfig, *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES, dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """One export. Use `Exporter` for several: it plans them once."""
    return Exporter(shards, hf_config, bucket_bytes=bucket_bytes, dtype=dtype).items()
