"""The stream of weights from a rank of the trainer to an engine in other processes: the sender and the receiver.

a training rank (rank 0)     every worker of one engine (ranks 1 …)
header, bytes  ─broadcast─►  header, bytes      repeated: neighbouring small tensors share one buffer,
header, bytes  ─broadcast─►  header, bytes      a large tensor is sent alone and without a copy
end            ─broadcast─►  end

A header is JSON: [[name, dtype, shape], …], or the reason why the stream ends here. Every engine has a process group of
its own, so that an engine that dies does not disturb the others. An export gives the whole weights to every training
rank, so the engines are shared out among all of them (`sender_of`): each rank sends to its engines only. The rendezvous
of all groups is a TCPStore of the trainer's rank 0, at the address under which the engines reach it.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import ParamSpec, TypedDict, TypeVar

import torch
import torch.distributed as dist

from megatron_srpo.bridge.bounded_nccl import BoundedNccl, BoundedWork
from megatron_srpo.bridge.buffers import Buffers
from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.verify import Report

PACKED_BYTES = 4 * 2**20  # smaller tensors share a buffer of at most this size
ALIGNMENT = 16  # bytes; every tensor in a buffer starts at a multiple, so that it can be viewed in its dtype
END = "end"
WORKER_TIMEOUTS = 3  # a worker waits this many times as long as rank 0, which may be waiting for another engine

Named = tuple[str, torch.Tensor]
P = ParamSpec("P")
T = TypeVar("T")


class WorkerReport(TypedDict, total=False):
    """What one worker says of one publish."""

    checksums: Report | None
    error: str  # "ErrorType: text"


@dataclass(frozen=True)
class GroupAddress:
    """Where the ranks of one process group rendezvous, in a form that JSON takes."""

    address: str
    port: int
    prefix: str  # of the group's keys in the store
    size: int  # number of ranks, the sender included
    timeout_s: float  # a worker's longest wait for the sender, in seconds
    backend: str = "gloo"  # or nccl


class RendezvousStore:
    """The sender's store. It listens on one address only, which is loopback unless the engines are elsewhere."""

    def __init__(self, address: str, timeout_s: float) -> None:
        listener = socket.create_server((address, 0), backlog=128)
        self.address, self.port = address, listener.getsockname()[1]
        self.store = dist.TCPStore(
            address, self.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )  # fmt: skip


def local_address(remote: str, port: int) -> str:
    """This machine's address as `remote` sees it. No packet is sent."""
    family = socket.getaddrinfo(remote, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((remote, port))
        return probe.getsockname()[0]


class Group:
    """One rank of the stream to one engine: broadcasts from rank 0, independent of all other process groups."""

    def __init__(self, address: GroupAddress, rank: int, device: torch.device, store: dist.Store | None = None) -> None:
        timeout = timedelta(seconds=address.timeout_s)
        if store is None:
            store = dist.TCPStore(address.address, address.port, wait_for_workers=False, timeout=timeout)
        self.store = dist.PrefixStore(address.prefix, store)
        self.rank, self.size = rank, address.size
        self._device = device if address.backend == "nccl" else torch.device("cpu")
        self._buffers = Buffers(self._device)
        self._timeout = timeout
        self._group: BoundedNccl | dist.ProcessGroupGloo
        if address.backend == "nccl":
            self._group = BoundedNccl(self.store, rank, address.size, timeout, device)
            return
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch has no type for it
        gloo._timeout, gloo._threads = timeout, 2
        # By default gloo listens on the address of the machine's host name, which may be any.
        here = local_address(address.address, address.port)
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
        self._group = dist.ProcessGroupGloo(self.store, rank, address.size, gloo)

    def start_broadcast(self, flat: torch.Tensor) -> dist.Work | BoundedWork:
        """Broadcast from rank 0. wait() of the result raises when a rank is gone or too slow. Keep `flat` until
        then."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return self._group.broadcast([flat], options)  # type: ignore[union-attr]  # nor for this

    def receive(self) -> tuple[str, torch.Tensor | None]:
        """On ranks above 0: (header, its bytes). At the end of the stream there are no bytes."""
        lengths = torch.empty(2, dtype=torch.int64, device=self._device)
        self.start_broadcast(lengths).wait()
        header_bytes, payload_bytes = lengths.tolist()
        header = torch.empty(header_bytes, dtype=torch.uint8, device=self._device)
        self.start_broadcast(header).wait()
        text = bytes(header.cpu().numpy()).decode()
        if payload_bytes == 0:
            return text, None
        payload = self._buffers.take(payload_bytes)
        self.start_broadcast(payload).wait()
        return text, payload

    def report(self, key: str, text: str) -> None:
        """Store `text` for rank 0, which can read it when this returns."""
        self.store.set(key, text)
        self.store.check([key])  # set() does not wait for the store, check() does

    def frames(self, header: str, payload: torch.Tensor | None) -> list[torch.Tensor]:
        """The tensors that rank 0 broadcasts for one header, in order."""
        text = torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8)
        size = 0 if payload is None else payload.numel()
        frames = [torch.tensor([text.numel(), size]), text] + ([] if payload is None else [payload])
        return [frame.to(self._device) for frame in frames]


def _nbytes(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def pack(items: Iterable[Named]) -> Iterator[tuple[str, torch.Tensor]]:
    """(header, bytes) of consecutive tensors. Holds PACKED_BYTES of memory in addition to what `items` holds."""
    waiting: list[Named] = []
    filled = 0
    for name, tensor in items:
        size = _nbytes(tensor)
        if waiting and filled + size > PACKED_BYTES:
            yield _packed(waiting)
            waiting, filled = [], 0
        waiting.append((name, tensor))
        filled += size
        del tensor  # the producer may free it before it makes the next
    if waiting:
        yield _packed(waiting)


def _packed(items: list[Named]) -> tuple[str, torch.Tensor]:
    header = json.dumps([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in items])
    if len(items) == 1:
        return header, items[0][1].detach().contiguous().view(-1).view(torch.uint8)
    flat = torch.empty(sum(_nbytes(t) for _, t in items), dtype=torch.uint8, device=items[0][1].device)
    start = 0
    for _, tensor in items:
        flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        start += _nbytes(tensor)
    return header, flat


def unpack(header: str, flat: torch.Tensor, device: torch.device) -> Iterator[Named]:
    """The tensors of one header, as views of its bytes on `device`."""
    flat, start = flat.to(device), 0
    for name, dtype, shape in json.loads(header):
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        yield name, flat[start : start + size].view(kind).view(shape)
        start += -(-size // ALIGNMENT) * ALIGNMENT


def receive_stream(group: Group, device: torch.device) -> Iterator[Named]:
    """All tensors that rank 0 sends. Raises BridgeError when rank 0 ends the stream early."""
    while True:
        header, payload = group.receive()
        if payload is not None:
            yield from unpack(header, payload, device)
        elif header == END:
            return
        else:
            raise BridgeError(f"the trainer stopped sending: {header}")


def send_stream(groups: dict[str, Group], items: Iterable[Named]) -> dict[str, str]:
    """Send all `items` to every group. Returns the reason of each group that failed, by the group's name.

    A group that fails gets nothing more. An exception of `items` ends the stream of every group, and is raised.
    """
    failed: dict[str, str] = {}
    if not groups:  # a rank without engines only takes part in the export
        for _ in items:
            pass
        return failed

    def everywhere(header: str, payload: torch.Tensor | None) -> None:
        alive = {name: group for name, group in groups.items() if name not in failed}
        frames = {name: group.frames(header, payload) for name, group in alive.items()}
        for step in range(2 if payload is None else 3):
            works: dict[str, dist.Work | BoundedWork | None] = {}
            for name, group in alive.items():
                if name not in failed:
                    works[name] = _attempt(failed, name, group.start_broadcast, frames[name][step])
            for name, work in works.items():
                if work is not None:
                    _attempt(failed, name, work.wait)

    try:
        for header, payload in pack(items):
            everywhere(header, payload)
    except Exception as error:
        everywhere(f"{type(error).__name__}: {error}", None)
        raise
    everywhere(END, None)
    return failed


def _attempt(
    failed: dict[str, str], name: str, function: Callable[P, T], *arguments: P.args, **options: P.kwargs
) -> T | None:
    """The function's result, or None and an entry in `failed`: a lost or silent peer is a RuntimeError."""
    try:
        return function(*arguments, **options)
    except RuntimeError as error:
        failed[name] = " ".join(str(error).split())[:200]
        return None


def sender_of(engine: int, engines: int, ranks: int) -> int:
    """The training rank that sends to engine number `engine`. Every rank gets at most ⌈engines / ranks⌉ engines; fewer
    engines than ranks are spread over all ranks, and so over all nodes and their network cards."""
    return engine * ranks // engines


class Streams:
    """One training rank's ends of the streams to its engines, which are known by their names."""

    def __init__(self, device: torch.device, store: dist.Store | None = None) -> None:
        """`store` is the rendezvous where this process has it; other ranks connect to it."""
        self._device, self._store = device, store
        self._groups: dict[str, Group] = {}

    def join(self, name: str, address: GroupAddress) -> None:
        """Returns when all workers have joined. Raises RuntimeError when they do not."""
        mine = replace(address, timeout_s=address.timeout_s / WORKER_TIMEOUTS)
        self._groups[name] = Group(mine, 0, self._device, self._store)

    def join_all(self, addresses: Mapping[str, GroupAddress]) -> dict[str, str]:
        """Join every group, one after the other. Returns the reason of each that failed, by its name."""
        failed: dict[str, str] = {}
        for name, address in addresses.items():
            _attempt(failed, name, self.join, name, address)
        return failed

    def has_group(self, name: str) -> bool:
        return name in self._groups

    def leave(self, name: str) -> None:
        """Forget a group. A group in which something failed cannot be used again."""
        self._groups.pop(name, None)

    def send(self, names: Iterable[str], items: Iterable[Named]) -> dict[str, str]:
        """See `send_stream`. Groups that fail are left."""
        failed = send_stream({name: self._groups[name] for name in names}, items)
        for name in failed:
            self.leave(name)
        return failed


class Sender(Streams):
    """Rank 0's end. It has the rendezvous of all groups, also of those to which other ranks send."""

    def __init__(self, address: str, *, timeout_s: float, backend: str, device: torch.device) -> None:
        """`address` is where engines and training ranks reach this process. `timeout_s` is the longest wait for an
        engine in a broadcast."""
        self._rendezvous = RendezvousStore(address, timeout_s)
        super().__init__(device, self._rendezvous.store)
        self._timeout, self._backend = timeout_s, backend
        self._prefixes: dict[str, str] = {}  # of each name's newest group
        self._created = 0

    def new_address(self, name: str, workers: int) -> GroupAddress:
        """The address of a new group of one training rank and the workers of `name`. Give it to the workers and to
        that rank's `join`."""
        self._created += 1
        store, timeout_s = self._rendezvous, WORKER_TIMEOUTS * self._timeout
        self._prefixes[name] = f"{name}/{self._created}"
        return GroupAddress(store.address, store.port, self._prefixes[name], 1 + workers, timeout_s, self._backend)

    def report(self, name: str, key: str, worker: int) -> WorkerReport | None:
        """What a worker of `name` says of the publish `key`, or None if it said nothing. Raises BridgeError when the
        worker refuses what it was sent, RuntimeError when it failed."""
        store = dist.PrefixStore(self._prefixes[name], self._rendezvous.store)
        if not store.check([f"{key}/{worker}"]):
            return None
        report: WorkerReport = json.loads(store.get(f"{key}/{worker}"))
        store.delete_key(f"{key}/{worker}")
        kind, _, text = report.get("error", "").partition(": ")
        if kind == BridgeError.__name__:
            raise BridgeError(f"{name}: {text}")
        if kind:
            raise RuntimeError(f"{kind}: {text}")
        return report
