"""How the driver (global rank 0) and the other ranks talk: objects over gloo, outside every training group."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_srpo.mcore.groups import Topology

T = TypeVar("T")


class Control:
    """The control channel of one rank. Every rank makes the same calls in the same order."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._receivers: list[list[int]] | None = None  # ranks of each model copy, by data-parallel rank

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
        """Run `compute` on the driver alone; every rank gets its result, or raises its exception."""
        box: list[Any] = [None, None]
        if self.is_driver:
            try:
                box[0] = compute()
            except Exception as error:  # the others wait: they must hear of it before it goes on here
                box[1] = error
        original = box[1]
        dist.broadcast_object_list(box, src=0, group=self._topology.control_group)
        if original is not None:
            raise original
        if box[1] is not None:
            raise box[1]
        return box[0]

    def on_driver(self, compute: Callable[[], T]) -> T | None:
        """Run `compute` on the driver alone, whose the result is (None elsewhere); its exception is raised on every
        rank."""
        box: list[Any] = [None]

        def run() -> None:
            box[0] = compute()

        self.share(run)
        return box[0]

    def everywhere(self, compute: Callable[[], T]) -> T:
        """Run `compute` on every rank; when it fails on one, every rank raises the first rank's exception."""
        result, failure = None, None
        try:
            result = compute()
        except Exception as error:
            failure = error
        failures = [error for error in self.collect(failure) if error is not None]
        if failure is not None:
            raise failure
        if failures:
            raise failures[0]
        return result

    def gather(self, mine: T) -> list[T] | None:
        """What every rank brings, by rank, on the driver; None elsewhere."""
        parts: list[Any] | None = [None] * self._topology.world_size if self.is_driver else None
        dist.gather_object(mine, parts, dst=0, group=self._topology.control_group)
        return parts

    def deal(self, part: Callable[[int], T]) -> T:
        """`part` of this rank's data-parallel rank, made on the driver.

        Parts are made and sent one after the other, each to the first rank that needs it, which hands it on to the
        others of its model copy: the driver sends every part once, and holds one of them in pickled form at a time.
        """
        topology = self._topology
        if self._receivers is None:
            copies: dict[int, list[int]] = {}
            for rank, dp_rank in enumerate(self.collect(topology.dp_rank)):
                copies.setdefault(dp_rank, []).append(rank)
            self._receivers = [copies[dp_rank] for dp_rank in sorted(copies)]
        leader, *others = self._receivers[topology.dp_rank]
        if self.is_driver:
            for dp_rank, (first, *_) in enumerate(self._receivers):
                if first != topology.rank:
                    self._send(_pickled(part(dp_rank)), [first])
            mine = part(topology.dp_rank)
            if others:
                self._send(_pickled(mine), others)
            return mine
        box = self._receive(0 if topology.rank == leader else leader)
        if topology.rank == leader:
            self._send(box, others)
        return pickle.loads(box)

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
        return memoryview(box.numpy())

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._topology.control_group)
        return bool(value)

    def collect(self, mine: T) -> list[T]:
        """What every rank brings, by rank, on every rank."""
        parts: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(parts, mine, group=self._topology.control_group)
        return parts

    def barrier(self) -> None:
        dist.barrier(group=self._topology.control_group)


def _pickled(value: Any) -> memoryview:
    """In memory that torch can send from without a copy."""
    box = io.BytesIO()
    pickle.dump(value, box, pickle.HIGHEST_PROTOCOL)
    return box.getbuffer()
