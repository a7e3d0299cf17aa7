"""How the driver (global rank 0) and the other ranks talk: objects over gloo, outside every training group."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_srpo.mcore.groups import Topology
from megatron_srpo.mcore.parcel import read_parcel, write_parcel

T = TypeVar("T")


class Control:
    """The control channel of one rank. Every rank makes the same calls in the same order. A job of one rank sends
    nothing: gloo takes a millisecond for an object that only its sender reads."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._alone = topology.world_size == 1
        self._copies: list[list[int]] = []  # see _receivers

    @property
    def is_driver(self) -> bool:
        return self._topology.is_driver

    @property
    def rank(self) -> int:
        return self._topology.rank

    @property
    def world_size(self) -> int:
        return self._topology.world_size

    def share(self, compute: Callable[[], T]) -> T:
        """Runs `compute` on rank 0; every rank gets its result, or raises its exception."""
        if not self.is_driver:
            return self.receive()
        with self.failing_together():
            value = compute()
        self.broadcast(value)
        return value

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Rank 0: an exception inside the block is raised there and, out of their next `receive`, on all ranks."""
        try:
            yield
        except Exception as error:  # the others wait: they must hear of it before it goes on here
            self._send_all([None, error])
            raise

    def broadcast(self, value: object) -> None:
        """Rank 0: send `value` to all ranks that `receive`."""
        self._send_all([value, None])

    def _send_all(self, box: list[object]) -> None:
        if not self._alone:
            dist.broadcast_object_list(box, src=0, group=self._topology.control_group)

    def receive(self) -> Any:
        """Other ranks: what rank 0 broadcasts, or raise what failed there."""
        box: list[Any] = [None, None]
        dist.broadcast_object_list(box, src=0, group=self._topology.control_group)
        value, error = box
        if error is not None:
            raise error
        return value

    def everywhere(self, compute: Callable[[], T]) -> T:
        """Run `compute` on every rank; when it fails on one, every rank raises the first rank's exception."""
        results: list[T] = []
        failure: Exception | None = None
        try:
            results.append(compute())
        except Exception as error:
            failure = error
        failures = [error for error in self.collect(failure) if error is not None]
        if failures:
            raise failure or failures[0]
        return results[0]

    def gather(self, mine: T) -> list[T]:
        """What every rank brings, by rank, on rank 0; [] elsewhere."""
        if self._alone:
            return [mine]
        parts: list[Any] = [None] * self._topology.world_size
        dist.gather_object(mine, parts if self.is_driver else None, dst=0, group=self._topology.control_group)
        return parts if self.is_driver else []

    def deal(self, part: Callable[[int], T]) -> T:
        """Rank 0: send `part` of each data-parallel rank to it; returns its own.

        Parts are made and sent one after the other, each to the first rank that needs it, which hands it on to the
        others of its model copy: rank 0 sends every part once, and holds one of them in pickled form at a time.
        """
        box = io.BytesIO()  # for one part after the other: fresh memory for each takes longer than the copy
        for dp_rank, (first, *_) in enumerate(self._receivers()):
            if first != self.rank:
                self._send(write_parcel(box, part(dp_rank)), [first])
        mine = part(self._topology.dp_rank)
        _, *others = self._receivers()[self._topology.dp_rank]
        if others:
            self._send(write_parcel(box, mine), others)
        return mine

    def receive_share(self) -> Any:
        """Other ranks: the part of this data-parallel rank."""
        first, *others = self._receivers()[self._topology.dp_rank]
        box = self._receive(0 if self.rank == first else first)
        if self.rank == first:
            self._send(box, others)
        return read_parcel(box)

    def _receivers(self) -> list[list[int]]:
        """Ranks of each model copy, by data-parallel rank; the first of them is rank 0 in its own."""
        if not self._copies:
            copies: dict[int, list[int]] = {}
            for rank, dp_rank in enumerate(self.collect(self._topology.dp_rank)):
                copies.setdefault(dp_rank, []).append(rank)
            self._copies = [copies[dp_rank] for dp_rank in sorted(copies)]
        return self._copies

    def _send(self, data: memoryview, receivers: list[int]) -> None:
        box = torch.frombuffer(data, dtype=torch.uint8)
        for receiver in receivers:
            dist.send(torch.tensor(box.numel()), receiver, group=self._topology.control_group)
            dist.send(box, receiver, group=self._topology.control_group)

    def _receive(self, sender: int) -> memoryview:
        size = torch.tensor(0)
        dist.recv(size, sender, group=self._topology.control_group)
        box = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(box, sender, group=self._topology.control_group)
        return memoryview(box.numpy())  # type: ignore[arg-type]

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        if self._alone:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._topology.control_group)
        return bool(value)

    def collect(self, mine: T) -> list[T]:
        """What every rank brings, by rank, on every rank."""
        if self._alone:
            return [mine]
        parts: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(parts, mine, group=self._topology.control_group)
        return parts

    def barrier(self) -> None:
        dist.barrier(group=self._topology.control_group)
