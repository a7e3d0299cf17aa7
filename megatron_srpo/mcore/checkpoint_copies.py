"""Copies to host memory what this rank writes into a checkpoint, and nothing else.

Megatron plans the save with placeholders, tensors that have a shape and no memory. The plan says which rank writes
which chunk of which tensor: of all ranks that have the same numbers, one. So every number is copied once, by the rank
that writes it, and the copies of a rank are as large as its files.

The optimizer's state is sharded by flat slices, a file's chunks by whole parameters. Most slices are whole parameters:
their one holder writes them. Few parameters lie across the border of two ranks: their slices are summed up over the
ranks, one parameter at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_srpo.mcore.checkpoint_state import Entries, Slice, entry_of_kind, optimizer_of, parameters, slices
from megatron_srpo.mcore.experts import is_expert
from megatron_srpo.mcore.policy import Policy

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import WriteBucket

STAGED = 2**26  # bytes of page-locked memory that a rank copies through

Holders = dict[torch.nn.Parameter, list[int]]  # which ranks of its group hold a slice of a parameter


def placeholder(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the same shape, and of `dtype` or the same, without memory."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")


def holders(policy: Policy) -> Holders:
    """Of all parameters on this rank. All ranks call it."""
    mine, found = {shard.parameter for shard in optimizer_of(policy).shards()}, {}
    for group, members in _by_group(policy):
        flags = _of_all_ranks([parameter in mine for parameter in members], group, policy.topology.device)
        for parameter, held in zip(members, flags, strict=True):
            found[parameter] = [rank for rank, holds in enumerate(held) if holds]
    return found


def planned_kind(kind: str, policy: Policy, held_by: Holders, entries: Entries) -> dict[str, Any]:
    """The sharded state dict of one kind of state for Megatron's plan of who writes what, with placeholders. A
    parameter that one rank holds whole is in this rank's alone, which makes it the writer."""
    mine, found = {shard.parameter for shard in optimizer_of(policy).shards()}, {}
    for index, parameter in enumerate(parameters(policy)):
        entry = entry_of_kind(kind, entries[parameter], placeholder(parameter, torch.float32))
        if len(held_by[parameter]) == 1:
            if parameter not in mine:
                continue
            *others, _ = entry.replica_id  # Megatron takes the copy with zeros alone; the last number is the rank's
            entry = dataclasses.replace(entry, replica_id=(*others, 0))
        found[str(index)] = entry
    return found


def filled(policy: Policy, buckets: list[WriteBucket], entries: Entries, held_by: Holders) -> list[WriteBucket]:
    """Megatron's write buckets with copies in host memory instead of placeholders. All ranks call it.

    `entries` are those of the model's weights. Training may change all tensors when this returns.
    """
    places = {item.index: tensor for *_, (_, tensors) in buckets for item, tensor in tensors}
    staging = Staging(policy.topology.device)
    copies: dict[MetadataIndex, torch.Tensor] = {}

    def take(entry: Any, owned: bool) -> None:
        for chunk in _chunks(entry):
            if (place := _place(chunk)) in places:
                copies[place] = staging.copy(chunk.data.detach(), owned=owned).view(places[place].shape)

    for parameter, entry in entries.items():
        take(entry_with(entry, parameter.detach()), owned=False)
    for kind, held in slices(policy).items():
        written = {
            parameter
            for parameter in parameters(policy)
            for chunk in _chunks(entry_of_kind(kind, entries[parameter], placeholder(parameter, torch.float32)))
            if _place(chunk) in places
        }
        for parameter, whole, owned in _gathered(policy, held, written, held_by):
            take(entry_of_kind(kind, entries[parameter], whole), owned=owned)
    return [
        (path, name, (objects, [(item, copies[item.index]) for item, _ in tensors]))
        for path, name, (objects, tensors) in buckets
    ]


def entry_with(entry: Any, tensor: torch.Tensor) -> Any:
    """The entry of a parameter's weights with `tensor` as its data."""
    return dataclasses.replace(entry, data=tensor)


def _chunks(entry: Any) -> Iterable[ShardedTensor]:
    """The chunks of a parameter: one, or several where Megatron stores parts of it apart (gate and up projections)."""
    return nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]


def _place(chunk: ShardedTensor) -> MetadataIndex:
    return MetadataIndex(chunk.key, chunk.global_offset)


def _gathered(
    policy: Policy, held: list[Slice], written: set[torch.nn.Parameter], held_by: Holders
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, bool]]:
    """The parameters of which this rank writes a chunk: the whole fp32 tensor of whose slices `held` are this rank's,
    and whether the tensor was made for the caller. The device holds one whole tensor at a time."""
    mine = {shard.parameter: (shard, tensor) for shard, tensor in held}
    for group, members in _by_group(policy):
        for parameter in members:
            shard, values = mine.get(parameter, (None, None))
            with optimizer_of(policy).present(*([] if values is None else [values])):
                whole = None if values is None else values.detach().view(-1)
                if parts := len(held_by[parameter]) > 1:
                    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                    if shard is not None and values is not None:
                        whole[shard.start : shard.stop] = values.detach()
                    dist.all_reduce(whole, group=group)
                if parameter in written:
                    assert whole is not None, "a parameter with one holder is written by it"
                    yield parameter, whole.view(parameter.shape), parts


def _by_group(policy: Policy) -> Iterator[tuple[dist.ProcessGroup | None, list[torch.nn.Parameter]]]:
    """The parameters by the group over which their optimizer state is sharded, in the same order on its ranks."""
    topology, found = policy.topology, list(parameters(policy))
    yield topology.dp_cp_group, [parameter for parameter in found if not is_expert(parameter)]
    yield topology.expert_dp_group, [parameter for parameter in found if is_expert(parameter)]


def _of_all_ranks(mine: list[bool], group: dist.ProcessGroup | None, device: torch.device) -> Iterator[list[int]]:
    """For each of this rank's flags those of all ranks of the group."""
    if not mine or group is None or group.size() == 1:
        return iter([int(flag)] for flag in mine)
    sent = torch.tensor(mine, dtype=torch.uint8, device=device)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(received, sent, group=group)
    return iter(torch.stack(received, dim=1).tolist())


class Staging:
    """Copies tensors to ordinary host memory. Those of a GPU pass through two page-locked pieces: while one is copied
    into ordinary memory the next arrives. So a save needs `STAGED` bytes of page-locked memory, whatever it copies."""

    def __init__(self, device: torch.device) -> None:
        self._pieces = (
            [torch.empty(STAGED // 2, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            if device.type == "cuda"
            else []
        )

    def copy(self, source: torch.Tensor, *, owned: bool = False) -> torch.Tensor:
        """A tensor in host memory that has `source`'s values and fills its storage. It is `source` itself if that is
        such a tensor and the caller says that it is `owned` by nobody else."""
        if owned and source.device.type == "cpu" and source.untyped_storage().nbytes() == source.nbytes:
            return source
        target = torch.empty(source.shape, dtype=source.dtype)
        if self._pieces:
            self._through(_bytes(source.contiguous()), _bytes(target))
        else:
            target.copy_(source)
        return target

    def _through(self, source: torch.Tensor, target: torch.Tensor) -> None:
        size = self._pieces[0].numel()
        arriving: list[tuple[torch.cuda.Event | None, torch.Tensor, torch.Tensor]] = []
        for number, (part, place) in enumerate(zip(source.split(size), target.split(size), strict=True)):
            piece = self._pieces[number % 2][: part.numel()]
            piece.copy_(part, non_blocking=True)
            arriving.append((_mark(part), piece, place))
            if number:
                _settle(*arriving.pop(0))
        for last in arriving:
            _settle(*last)


def _mark(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """An event after all copies of this tensor's device so far."""
    if tensor.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _settle(event: torch.cuda.Event | None, piece: torch.Tensor, place: torch.Tensor) -> None:
    if event is not None:
        event.synchronize()
    place.copy_(piece)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
