"""The pure and invertible arithmetic between Hugging Face tensors and tensor-parallel Megatron shards.

A rule knows how one Megatron parameter is made of one or more Hugging Face tensors; table.py finds the rule of a name.
For every rule, `from_shards([to_shard(tensors, r, tp) for r in range(tp)])` is `tensors`, bit for bit.

    rule        Hugging Face tensors           the shard of rank r
    Replicated  w                              w
    Column      w [out, …]                     rows r·out/tp …                      (linear: output features)
    Row         w [out, in]                    columns r·in/tp …                    (linear: input features)
    Vocab       w [vocab, hidden]              rows r·padded/tp …, zero past vocab
    QKV         q, k, v                        its query groups, each [q … q k v]
    GatedMLP    gate, up                       [gate_r; up_r]

Sources are tensors or safetensors slices. Only what a rank needs is read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_srpo.bridge.errors import BridgeError

Shape = tuple[int, ...]
Index = slice | tuple[slice, ...]


class TensorSlice(Protocol):
    """A tensor in a safetensors file. Only the part that is indexed is read."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str:
        """safetensors' name of it, for example BF16."""
        ...

    def __getitem__(self, index: Index) -> torch.Tensor: ...


Source = torch.Tensor | TensorSlice


class Rule(Protocol):
    """How a Megatron parameter corresponds to Hugging Face tensors (always in the same order)."""

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        """Shapes of the full Hugging Face tensors behind a shard of this shape."""
        ...

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        """The shard of one rank. `sources` are tensors or safetensors slices of the shapes `hf_shapes` gives."""
        ...

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The full tensors from the shards of all ranks, in rank order. May return views of the shards."""
        ...


def _join(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate the parts. One part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class Replicated:
    """One tensor that is the same on every rank, such as a norm."""

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        return [shard_shape]

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        return sources[0][:]

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [shards[0]]


class Column:
    """One tensor, split along its first dimension: the output features of a linear layer, or its bias."""

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        return [(shard_shape[0] * tp_size, *shard_shape[1:])]

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        return _rank_rows(sources[0], tp_rank, tp_size)

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_join(shards, 0)]


class Row:
    """One tensor, split along its second dimension: the input features of a linear layer."""

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        rows, columns = shard_shape
        return [(rows, columns * tp_size)]

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        width = shape_of(sources[0])[1] // tp_size
        return sources[0][:, tp_rank * width : (tp_rank + 1) * width]

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_join(shards, 1)]


@dataclass(frozen=True)
class Vocab:
    """One tensor, split along the vocabulary. Zero rows pad it to a multiple of the ranks; they are never exported."""

    size: int
    padded_size: int

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        return [(self.size, *shard_shape[1:])]

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        rows = self.padded_size // tp_size
        start, stop = (min(row, self.size) for row in (tp_rank * rows, (tp_rank + 1) * rows))
        if stop - start == rows:
            return sources[0][start:stop]
        real = sources[0][start:stop] if stop > start else sources[0][:1][:0]
        return torch.cat([real, real.new_zeros(rows - (stop - start), *real.shape[1:])])

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = shards[0].shape[0]
        # The padding is cut off before the parts are joined, so that it is not copied.
        parts = [shard[: max(0, min(rows, self.size - rank * rows))] for rank, shard in enumerate(shards)]
        return [_join(parts, 0)]


@dataclass(frozen=True)
class QKV:
    """Query, key and value in one matrix (or bias): for each query group its query heads, its key, its value head.

    Tensor parallelism splits by groups, so `groups` must be divisible by its size.
    """

    heads: int
    groups: int
    head_dim: int

    @property
    def _queries(self) -> int:
        """The number of query heads of a group."""
        return self.heads // self.groups

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        rest = shard_shape[1:]
        keys = (self.groups * self.head_dim, *rest)
        return [(self.heads * self.head_dim, *rest), keys, keys]

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        if self.groups % tp_size:
            raise BridgeError(
                f"{self.groups} key-value heads cannot be split over tensor parallel size {tp_size}: expected a "
                "tensor_model_parallel_size that divides num_key_value_heads."
            )
        groups = self.groups // tp_size
        parts = [_rank_rows(source, tp_rank, tp_size) for source in sources]
        # [rows, …] → [groups, rows of a group, …], then side by side within the group
        grouped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        queries, width = self._queries, self._queries + 2
        heads = [shard.reshape(-1, width, self.head_dim, *shard.shape[1:]) for shard in shards]
        bounds = ((0, queries), (queries, queries + 1), (queries + 1, width))
        return [_join([part[:, start:stop] for part in heads], 0).flatten(0, 2) for start, stop in bounds]


class GatedMLP:
    """Gate and up projection of a gated MLP in one matrix. Every rank holds its rows of both."""

    def hf_shapes(self, shard_shape: Shape, tp_size: int) -> list[Shape]:
        full = (shard_shape[0] // 2 * tp_size, *shard_shape[1:])
        return [full, full]

    def to_shard(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> torch.Tensor:
        return torch.cat([_rank_rows(source, tp_rank, tp_size) for source in sources])

    def from_shards(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        half = shards[0].shape[0] // 2
        return [_join([s[:half] for s in shards], 0), _join([s[half:] for s in shards], 0)]


def shape_of(source: Source) -> Shape:
    """Shape of a tensor or a safetensors slice."""
    return tuple(source.shape if isinstance(source, torch.Tensor) else source.get_shape())


def _rank_rows(source: Source, tp_rank: int, tp_size: int) -> torch.Tensor:
    rows = shape_of(source)[0] // tp_size
    return source[tp_rank * rows : (tp_rank + 1) * rows]
