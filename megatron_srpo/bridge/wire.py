"""How weights travel from the trainer's driver to an engine in other processes: both halves of one stream.

driver, rank 0            every worker of one engine, ranks 1 …
header, bytes  ─broadcast─►  header, bytes      again and again: neighbouring small tensors in one buffer,
header, bytes  ─broadcast─►  header, bytes      a large tensor alone and without a copy
end            ─broadcast─►  end

A header is JSON: [[name, dtype, shape], …], or why the stream ends here. Every engine has a group of its own, so that
one that dies takes nothing with it. Rendezvous is a TCPStore of the driver, on the address that the engines see.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_srpo.bridge.buffers import Buffers
from megatron_srpo.bridge.errors import BridgeError

PACKED_BYTES = 4 * 2**20  # smaller tensors share a buffer of at most this size
ALIGNMENT = 16  # bytes; every tensor in a buffer starts at a multiple, so that it can be viewed in its dtype
END = "end"
PATIENCE = 3  # a worker waits so many times as long as the driver: the driver may be waiting for another engine

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one group meet, in a form that JSON takes. `backend`: gloo or nccl."""

    address: str
    port: int
    prefix: str  # of the group's keys in the store
    size: int  # ranks, the driver included
    timeout_s: float  # a worker's longest wait for the driver
    backend: str = "gloo"


class Rendezvous:
    """The driver's store. It listens on one address only: loopback unless the engines are elsewhere."""

    def __init__(self, address: str, timeout_s: float) -> None:
        listener = socket.create_server((address, 0), backlog=128)
        self.address, self.port = address, listener.getsockname()[1]
        self.store = dist.TCPStore(
            address, self.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )  # fmt: skip


def local_address(remote: str, port: int) -> str:
    """This machine's address as `remote` sees it; nothing is sent."""
    family = socket.getaddrinfo(remote, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((remote, port))
        return probe.getsockname()[0]


class Group:
    """One rank's end of the stream to one engine: broadcasts from rank 0, outside every other process group."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, store: Any = None) -> None:
        timeout = timedelta(seconds=meeting.timeout_s)
        if store is None:
            store = dist.TCPStore(meeting.address, meeting.port, wait_for_workers=False, timeout=timeout)
        self.store = dist.PrefixStore(meeting.prefix, store)
        self.rank, self.size = rank, meeting.size
        self._device = device if meeting.backend == "nccl" else torch.device("cpu")
        self._buffers = Buffers(self._device)
        self._timeout = timeout
        if meeting.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(self.store, rank, meeting.size, options)
            return
        options = dist.ProcessGroupGloo._Options()
        options._timeout, options._threads = timeout, 2
        # By default gloo listens on the address of the machine's name, whatever that is.
        here = local_address(meeting.address, meeting.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
        self._group = dist.ProcessGroupGloo(self.store, rank, meeting.size, options)

    def start_broadcast(self, flat: torch.Tensor) -> Any:
        """From rank 0; the result's wait() raises when a rank is gone or too slow. `flat` must live until then."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return self._group.broadcast([flat], options)

    def receive(self) -> tuple[str, torch.Tensor | None]:
        """(header, its bytes, None at the end), on ranks above 0."""
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
        """Leave `text` for the driver; it is there when this returns."""
        self.store.set(key, text)
        self.store.check([key])  # set() alone does not wait

    def frames(self, header: str, payload: torch.Tensor | None) -> list[torch.Tensor]:
        """What rank 0 broadcasts for one header, in order."""
        text = torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8)
        size = 0 if payload is None else payload.numel()
        frames = [torch.tensor([text.numel(), size]), text] + ([] if payload is None else [payload])
        return [frame.to(self._device) for frame in frames]


def _nbytes(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def pack(items: Iterable[Named]) -> Iterator[tuple[str, torch.Tensor]]:
    """(header, bytes) of consecutive tensors. Holds PACKED_BYTES beside what `items` holds."""
    waiting: list[Named] = []
    filled = 0
    for name, tensor in items:
        size = _nbytes(tensor)
        if waiting and filled + size > PACKED_BYTES:
            yield _packed(waiting)
            waiting, filled = [], 0
        waiting.append((name, tensor))
        filled += size
        del tensor  # the caller may free it before the next
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
    """Everything that the driver sends, until its end. Raises BridgeError when the driver gives up."""
    while True:
        header, payload = group.receive()
        if payload is not None:
            yield from unpack(header, payload, device)
        elif header == END:
            return
        else:
            raise BridgeError(f"the trainer stopped sending: {header}")


def send_stream(groups: dict[str, Group], items: Iterable[Named]) -> dict[str, str]:
    """Send all of `items` to every group; returns name → what went wrong, for the groups that failed.

    A group that fails is left out from there on. An exception of `items` ends the stream everywhere, and is raised.
    """
    failed: dict[str, str] = {}

    def everywhere(header: str, payload: torch.Tensor | None) -> None:
        alive = {name: group for name, group in groups.items() if name not in failed}
        frames = {name: group.frames(header, payload) for name, group in alive.items()}
        for step in range(2 if payload is None else 3):
            works = {}
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


def _attempt(failed: dict[str, str], name: str, function: Any, *arguments: Any) -> Any:
    """`function`'s result, or None and a note of why there is none: gloo raises RuntimeError when a peer is gone."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        failed[name] = " ".join(str(error).split())[:200]
        return None


class Sender:
    """The driver's end of the streams to all engines."""

    def __init__(self, address: str, *, timeout_s: float, backend: str, device: torch.device) -> None:
        """`address`: where engines meet this process. `timeout_s`: longest wait for an engine in one broadcast."""
        self._rendezvous = Rendezvous(address, timeout_s)
        self._timeout, self._backend, self._device = timeout_s, backend, device
        self._groups: dict[str, Group] = {}
        self._meetings = 0

    def joined(self, name: str) -> bool:
        return name in self._groups

    def meeting(self, name: str, workers: int) -> dict[str, Any]:
        """Where the workers of `name` and this process meet next; goes to the workers, and to `join`."""
        self._meetings += 1
        rendezvous = self._rendezvous
        prefix, patience = f"{name}/{self._meetings}", PATIENCE * self._timeout
        return asdict(Meeting(rendezvous.address, rendezvous.port, prefix, 1 + workers, patience, self._backend))

    def join(self, name: str, meeting: dict[str, Any]) -> None:
        """Returns when all workers have come. Raises RuntimeError when they do not."""
        mine = replace(Meeting(**meeting), timeout_s=self._timeout)
        self._groups[name] = Group(mine, 0, self._device, self._rendezvous.store)

    def leave(self, name: str) -> None:
        """A group in which something failed cannot be used again."""
        self._groups.pop(name, None)

    def send(self, names: Iterable[str], items: Iterable[Named]) -> dict[str, str]:
        """See `send_stream`; groups that fail are left."""
        failed = send_stream({name: self._groups[name] for name in names}, items)
        for name in failed:
            self.leave(name)
        return failed

    def report(self, name: str, key: str, worker: int) -> dict[str, Any] | None:
        """What a worker of `name` says of the publish `key`, None if nothing. Raises BridgeError when it refuses what
        it was sent, RuntimeError when it failed."""
        store = self._groups[name].store
        if not store.check([f"{key}/{worker}"]):
            return None
        report = json.loads(store.get(f"{key}/{worker}"))
        store.delete_key(f"{key}/{worker}")
        kind, _, text = report.get("error", "").partition(": ")
        if kind == BridgeError.__name__:
            raise BridgeError(f"{name}: {text}")
        if kind:
            raise RuntimeError(f"{kind}: {text}")
        return report
