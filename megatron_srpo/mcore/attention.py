"""Core attention for packed rows on torch's scaled_dot_product_attention, used without Transformer Engine.

Megatron's own unfused attention refuses packed (THD) rows. A packed row's sequences are grouped by similar length,
each group is right-padded into one batch, and runs causally. Under a causal mask no real query sees the padding on its
right, so no mask is built and no [T, T] matrix exists.

A sequence may go on behind another one of the row, its prefix, which may go on behind another one itself: tokens of
prompts that several samples share (batching/prefixes.py). Its queries see the keys of all of them and its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_srpo.core.tensors import chain_of
from megatron_srpo.mcore.context import positions_by_rank
from megatron_srpo.mcore.few_passes import AutogradContext

_MAX_PADDING = 1.25  # a group's longest sequence may have this many times the tokens of its shortest one …
_SHORT = 64  # … but shorter sequences always share a group: another call costs more than their padding


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Groups of sequences of similar length, each of which runs as one batch: their indices, longest first. Sequences
    of length 0 are left out."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] == 0:
            continue
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (longest <= _SHORT or longest <= _MAX_PADDING * lengths[index]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@dataclass(frozen=True)
class _Batches:
    """The sequences of a row as padded batches, which every layer uses: B sequences of up to L tokens each.

    Padding repeats a sequence's last token. A causal mask hides it from all real queries, so that its keys and values
    have no gradient, and what padded queries find is not used."""

    positions: list[Tensor]  # [B, L] in the row, of each batch
    places: Tensor  # [T] of each token of the row in the batches, one after the other
    behind: list[_Behind | None]  # what the sequences of each batch go on behind
    in_order: bool  # there is one batch, and it has the row's tokens as they stand: nothing needs copying

    @classmethod
    def of(cls, cu_seqlens: Tensor, prefixes: Sequence[int]) -> _Batches:
        """Made once for a row, and kept with its `cu_seqlens`."""
        known: _Batches | None = getattr(cu_seqlens, "batches", None)
        if known is not None:
            return known
        bounds, device = cu_seqlens.tolist(), cu_seqlens.device
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        groups = [(group, False) for group in length_groups(_without_branches(lengths, prefixes))]
        groups += [(group, True) for group in _branches(lengths, prefixes)]
        positions: list[Tensor] = []
        behind: list[_Behind | None] = []
        places, passed = torch.empty(bounds[-1], dtype=torch.long, device=device), 0
        for group, is_branch in groups:
            starts, sizes = (torch.tensor(values, device=device)[:, None] for values in _spans(bounds, group))
            steps = torch.arange(int(sizes.max()), device=device)
            own = starts + torch.minimum(steps, sizes - 1)
            valid = (steps < sizes).flatten()
            places[own.flatten()[valid]] = torch.arange(passed, passed + own.numel(), device=device)[valid]
            passed += own.numel()
            positions.append(own)
            behind.append(_Behind.of(bounds, prefixes, group, sizes, device) if is_branch else None)
        in_order = len(positions) == 1 and passed == len(places) and bool((places.diff() == 1).all())
        made = cls(positions, places, behind, in_order)
        cu_seqlens.batches = made  # type: ignore[attr-defined]
        return made

    def pad(self, values: Tensor) -> Sequence[Tensor]:
        """[T, …] → [B, L, …] for each batch."""
        if self.in_order:
            return [values.view(*self.positions[0].shape, *values.shape[1:])]
        return _Pad.apply(values, self.places, *self.positions)

    def unpad(self, batches: Sequence[Tensor]) -> Tensor:
        """[B, L, …] of each batch → [T, …]."""
        return batches[0].flatten(0, 1) if self.in_order else _Unpad.apply(self.places, *batches)


@dataclass(frozen=True)
class _Behind:
    """The prefixes of B sequences, padded on the left to P tokens."""

    positions: Tensor  # [families, P] in the row
    family: Tensor  # [B] which of them each sequence is behind
    seen: Tensor  # [B, L / ranks, P + L] bool, which keys each of this rank's queries sees: its prefix's, its own

    @classmethod
    def of(
        cls, bounds: list[int], prefixes: Sequence[int], members: list[int], sizes: Tensor, device: torch.device,
        rank: int = 0, ranks: int = 1,
    ) -> _Behind:  # fmt: skip
        """prefixes of the row; sizes [B, 1] of the sequences `members`, which go on behind others."""
        families = sorted({prefixes[i] for i in members})
        family = torch.tensor([families.index(prefixes[i]) for i in members], device=device)
        tokens = [
            torch.cat([torch.arange(bounds[i], bounds[i + 1], device=device) for i in chain_of(prefix, prefixes)])
            for prefix in families
        ]
        lengths = torch.tensor([len(one) for one in tokens], device=device)[:, None]
        longest, before = int(sizes.max()), int(lengths.max())
        steps, places = torch.arange(longest, device=device), torch.arange(before, device=device)
        positions = torch.stack([F.pad(one, (before - len(one), 0), value=int(one[0])) for one in tokens])
        mine, shift = steps[: longest // ranks], before - lengths
        seen = torch.cat(
            [
                (places >= shift[family])[:, None, :].expand(-1, len(mine), -1),
                steps <= _in_sequence(mine, sizes, rank, ranks)[:, :, None],
            ],
            dim=2,
        )
        return cls(positions, family, seen)

    def keys(self, values: Tensor, own: Tensor) -> Tensor:
        """[B, P + L, …] the row's `values` [T, …] of the prefixes and then the `own` ones [B, L, …]."""
        return torch.cat([values[self.positions][self.family], own], dim=1)


class _Pad(torch.autograd.Function):
    """[T, …] → [B, L, …] for each batch. The gradient of padding is 0, so it is left out instead of added up."""

    @staticmethod
    def forward(ctx: AutogradContext, values: Tensor, places: Tensor, *positions: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(places)
        return tuple(
            values.index_select(0, batch.flatten()).view(*batch.shape, *values.shape[1:]) for batch in positions
        )

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _flat(grads).index_select(0, places), None, *(None for _ in grads)


class _Unpad(torch.autograd.Function):
    """[B, L, …] of each batch → [T, …]."""

    @staticmethod
    def forward(ctx: AutogradContext, places: Tensor, *batches: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shapes = [batch.shape for batch in batches]  # type: ignore[attr-defined]
        return _flat(batches).index_select(0, places)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        shapes: list[torch.Size] = ctx.shapes  # type: ignore[attr-defined]
        counts = [shape[0] * shape[1] for shape in shapes]
        padded = grad.new_zeros(sum(counts), *grad.shape[1:]).index_copy_(0, places, grad)
        parts = zip(padded.split(counts), shapes, strict=True)
        return None, *(part.view(shape) for part, shape in parts)


def _flat(batches: Sequence[Tensor]) -> Tensor:
    """[B, L, …] of each batch as one [Σ B·L, …]."""
    parts = [batch.flatten(0, 1) for batch in batches]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def packed_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, scale: float | None, dropout: float,
    prefixes: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Causal attention inside each sequence of one packed row.

    query [T, heads, d], key and value [T, groups, d], cu_seqlens [S+1], prefixes as in PackedBatch; returns
    [T, heads, d].

    The keys of sequences with a prefix are the prefix's and their own; the mask is [B, L, P + L] booleans. Hidden
    states of a prefix are not copied, keys and values are.
    """
    batches = _Batches.of(cu_seqlens, prefixes)
    padded = map(batches.pad, (query, key, value))
    found = []
    for behind, q, k, v in zip(batches.behind, *padded, strict=True):
        if behind is not None:
            k, v = behind.keys(key, k), behind.keys(value, v)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=behind is None,
            attn_mask=None if behind is None else behind.seen[:, None], dropout_p=dropout, scale=scale,
            enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip
        found.append(mixed.transpose(1, 2))
    return batches.unpad(found)


def _branches(lengths: list[int], prefixes: Sequence[int]) -> Iterator[list[int]]:
    """The sequences that have a prefix, in groups whose own lengths and whose prefixes' lengths are similar."""
    branches = [index for index, prefix in enumerate(prefixes) if prefix >= 0]
    before = [sum(lengths[i] for i in chain_of(prefixes[index], prefixes)) for index in branches]
    for alike in length_groups(before):
        members = [branches[i] for i in alike]
        for group in length_groups([lengths[index] for index in members]):
            yield [members[i] for i in group]


def _without_branches(lengths: list[int], prefixes: Sequence[int]) -> list[int]:
    """The lengths, 0 for the sequences that have a prefix."""
    return [0 if prefixes and prefixes[index] >= 0 else length for index, length in enumerate(lengths)]


def _in_sequence(mine: Tensor, sizes: Tensor, rank: int, ranks: int) -> Tensor:
    """[B, L / ranks] place in its whole sequence of each token that a context-parallel rank has of it: two of 2 · ranks
    chunks. sizes [B, 1]."""
    chunk = sizes // (2 * ranks)
    return torch.where(mine < chunk, mine + rank * chunk, mine - chunk + (2 * ranks - 1 - rank) * chunk)


def _spans(bounds: list[int], sequences: list[int]) -> tuple[list[int], list[int]]:
    """The starts and the lengths of these sequences."""
    return [bounds[i] for i in sequences], [bounds[i + 1] - bounds[i] for i in sequences]


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    group: dist.ProcessGroup,
    *,
    scale: float | None,
    dropout: float,
    prefixes: Sequence[int] = (),
) -> Tensor:
    """`packed_causal_attention` of a row that is spread over the ranks of `group` (order: mcore/context.py).

    query [T/CP, heads, d], key and value [T/CP, groups, d], cu_seqlens [S+1] of the whole row; returns
    [T/CP, heads, d]. Keys and values are gathered (their gradients are summed and scattered); this rank's two chunks of
    each sequence attend through a mask, [B, L/CP, L] booleans for B sequences of up to L tokens.
    """
    rank, size = group.rank(), group.size()
    back = positions_by_rank(cu_seqlens, size).flatten().argsort()
    key, value = (gather_from_sequence_parallel_region(x, group=group)[back] for x in (key, value))
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    output = query.new_zeros(query.size(0), query.size(1), value.size(2))
    for members in length_groups(_without_branches(lengths, prefixes)):
        longest = lengths[members[0]]
        starts = torch.tensor([bounds[i] for i in members], device=query.device)[:, None]
        sizes = torch.tensor([lengths[i] for i in members], device=query.device)[:, None]
        steps = torch.arange(longest, device=query.device)[None, :]
        mine = steps[:, : longest // size]
        seen = _in_sequence(mine, sizes, rank, size)
        mask = steps[:, None, :] <= seen[:, :, None]  # [B, L/CP, L]
        valid = mine < sizes // size
        own = starts // size + torch.minimum(mine, sizes // size - 1)
        all_keys = starts + torch.minimum(steps, sizes - 1)
        q, k, v = (x[at].transpose(1, 2) for x, at in ((query, own), (key, all_keys), (value, all_keys)))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], dropout_p=dropout, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        output = output.index_put((own[valid],), mixed.transpose(1, 2)[valid])
    for members in _branches(lengths, prefixes):
        starts, sizes = (torch.tensor(values, device=query.device)[:, None] for values in _spans(bounds, members))
        steps = torch.arange(int(sizes.max()), device=query.device)
        mine = steps[: len(steps) // size]
        behind = _Behind.of(bounds, prefixes, members, sizes, query.device, rank, size)
        own = starts // size + torch.minimum(mine, sizes // size - 1)
        all_keys = starts + torch.minimum(steps, sizes - 1)
        q, k, v = query[own], behind.keys(key, key[all_keys]), behind.keys(value, value[all_keys])
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=behind.seen[:, None], dropout_p=dropout,
            scale=scale, enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip
        valid = mine < sizes // size
        output = output.index_put((own[valid],), mixed.transpose(1, 2)[valid])
    return output


@dataclass
class SharedSeqParams(PackedSeqParams):
    """Megatron's description of a packed row, and which sequences go on behind which others.

    `max_seqlen_q` and `max_seqlen_kv` count a sequence's prefix too, because rotary embeddings need as many positions.
    """

    prefixes: tuple[int, ...] = ()
    keys: Tensor | None = None
    """[T_kv] int64: the positions in the row of the keys that each sequence sees, its outermost prefix first, one
    sequence after the other."""
    key_bounds: Tensor | None = None  # [S+1] int32: where the keys of each sequence begin

    @classmethod
    def of(cls, cu_seqlens: Tensor, prefixes: tuple[int, ...]) -> SharedSeqParams:
        """cu_seqlens [S+1] int32 and prefixes of PackedBatch; both new tensors are on its device."""
        bounds = cu_seqlens.tolist()
        chains = [chain_of(own, prefixes) for own in range(len(prefixes))]
        parts = [torch.arange(bounds[i], bounds[i + 1]) for chain in chains for i in chain]
        seen = [sum(bounds[i + 1] - bounds[i] for i in chain) for chain in chains]
        key_bounds = torch.tensor([0, *itertools.accumulate(seen)], dtype=torch.int32)
        return cls(
            "thd", cu_seqlens, cu_seqlens, None, None, max(seen), max(seen), prefixes=prefixes,
            keys=torch.cat(parts).to(cu_seqlens.device), key_bounds=key_bounds.to(cu_seqlens.device),
        )  # fmt: skip


def prefixes_of(params: PackedSeqParams) -> tuple[int, ...]:
    """See PackedBatch.prefixes."""
    return params.prefixes if isinstance(params, SharedSeqParams) else ()


class PackedAttention(MegatronModule):
    """`core_attention` of Megatron's self attention; the signature is Megatron's DotProductAttention."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, **unused: object,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # fmt: skip
        """query [T, heads, d] (THD, this rank's part of one packed row); returns [T, heads·d]."""
        assert packed_seq_params is not None, "rows are always packed"
        given = (query, key, value, packed_seq_params.cu_seqlens_q)
        scale, dropout = self.softmax_scale, self.dropout if self.training else 0.0
        # Each tensor-parallel rank has its own heads, and needs its own generator for dropout. Under sequence
        # parallelism Megatron has switched to it for the whole layer already.
        own = nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        with own:
            prefixes = prefixes_of(packed_seq_params)
            if self.config.context_parallel_size > 1:
                group = parallel_state.get_context_parallel_group()
                mixed = context_parallel_attention(*given, group, scale=scale, dropout=dropout, prefixes=prefixes)
            else:
                mixed = packed_causal_attention(*given, scale=scale, dropout=dropout, prefixes=prefixes)
        return mixed.reshape(mixed.size(0), -1)
