"""Context parallelism on packed rows: which positions of a row are on which rank.

Every sequence of a row is cut into 2·CP equal chunks; rank r has chunks r and 2·CP − 1 − r of each, which balances
causal attention. It is Megatron's and Transformer Engine's order for packed (THD) rows: their rotary embedding and
attention count on it. The row's `cu_seqlens` describes whole sequences; a rank's part has a CP-th of every length.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.core.tensors import PackedBatch


def positions_by_rank(cu_seqlens: Tensor, size: int) -> Tensor:
    """[size, T/size] positions of the row that each context-parallel rank has, in its own order."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    assert not (lengths % (2 * size)).any(), f"sequences of {lengths.tolist()} tokens do not cut into {2 * size} chunks"
    start = cu_seqlens[:-1].long().repeat_interleave(lengths)
    positions = torch.arange(int(lengths.sum()), device=cu_seqlens.device)
    chunk = (positions - start) // (lengths // (2 * size)).repeat_interleave(lengths)
    owner = torch.minimum(chunk, 2 * size - 1 - chunk)
    return torch.stack([positions[owner == rank] for rank in range(size)])


def local_part(row: PackedBatch, rank: int, size: int, group: dist.ProcessGroup) -> PackedBatch:
    """This rank's part of a whole row."""
    mine = positions_by_rank(row.cu_seqlens, size)[rank]
    part = row.map(lambda values: values[mine], without=("cu_seqlens",))
    return dataclasses.replace(part, cu_seqlens=row.cu_seqlens // size, context_group=group)


def gather_parts(values: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole row's values [T, …] on every rank, in the row's order, from each rank's part [T/size, …]."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    order = positions_by_rank(cu_seqlens, group.size()).flatten()
    whole = values.new_empty(order.numel(), *values.shape[1:])
    whole[order] = torch.cat(parts)
    return whole
