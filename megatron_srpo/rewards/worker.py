"""What runs inside a reward worker: reads chunks of tasks, writes one result a task, as soon as it has it.

The channel is one end of a socket pair. In: 8 bytes of length, then a pickle (first the Setup, then chunks). Out: one
line of JSON for each task, so that nothing a reward function does can make the driver execute anything. Standard output
is the driver's to read and to drop. Imports neither torch nor anything that does.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from megatron_srpo.rewards.registry import RewardError, RewardFunction, as_verdict, resolve

HEADER_BYTES = 8
ORPHAN_GRACE = 5  # seconds after which a task outlives its time-out only if nobody is left to enforce it
ERROR_LIMIT = 500  # characters


@dataclass(frozen=True)
class Setup:
    """What a worker is told first."""

    kinds: tuple[str, ...]
    functions: dict[str, str]  # kind → reference of the user's own functions
    timeout_seconds: float
    memory_mib: int  # address space above what the worker has at its start; 0 = no limit


def encode(message: Any) -> bytes:
    """A message to a worker, with its header."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def main(descriptor: int) -> None:
    """Serve the driver at the other end of the socket until it closes it. Never returns."""
    channel = socket.socket(fileno=descriptor)
    setup = _receive(channel)
    if setup is not None:
        functions = _resolve_all(channel, setup)
        if functions is not None:
            _limit(setup.memory_mib)
            _send(channel, {"ready": True})
            _serve(channel, functions, setup.timeout_seconds)
    os._exit(0)  # quick, and whatever threads the user's functions started do not keep it


def score_one(function: RewardFunction, response: str, answer: Any, metadata: dict[str, Any]) -> list[Any]:
    """[score or None, feedback, well_formed, prediction, error]; whatever the function raises is the error."""
    try:
        return [*as_verdict(function(response, answer, metadata)), None]
    except MemoryError:
        return [None, None, None, None, "crash: out of memory (reward.memory_mib limits it)"]
    except RewardError as error:
        text = str(error)
    except BaseException as error:  # SystemExit too: a reward function must not end the worker
        text = f"{type(error).__name__}: {error}"
    return [None, None, None, None, f"exception: {text[:ERROR_LIMIT]}"]


def _resolve_all(channel: socket.socket, setup: Setup) -> dict[str, RewardFunction] | None:
    try:
        return {kind: resolve(kind, setup.functions) for kind in setup.kinds}
    except RewardError as error:
        _send(channel, {"failed": str(error)})
    except BaseException as error:
        _send(channel, {"failed": f"{type(error).__name__}: {error}"})
    return None


def _serve(channel: socket.socket, functions: dict[str, RewardFunction], timeout_seconds: float) -> None:
    # The driver enforces the time-out. The alarm only ends a worker that hangs after its driver was killed; its default
    # action needs no Python code to run, so that it works inside a C extension too.
    alarm, worker = math.ceil(timeout_seconds) + ORPHAN_GRACE, os.getpid()
    while (chunk := _receive(channel)) is not None:
        for kind, response, answer, metadata in chunk:
            signal.alarm(alarm)
            result = score_one(functions[kind], response, answer, metadata)
            signal.alarm(0)
            if os.getpid() != worker:  # a process that the function has forked comes back here too
                os._exit(0)
            _send(channel, result)


def _limit(memory_mib: int) -> None:
    """Cap the address space above its present size, where the system lets us; no core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mib and sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            present = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + memory_mib * 2**20,) * 2)


def _receive(channel: socket.socket) -> Any:
    """The next message, or None when the driver is gone."""
    header = _read(channel, HEADER_BYTES)
    body = header and _read(channel, int.from_bytes(header, "big"))
    return pickle.loads(body) if body else None


def _read(channel: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            count = channel.recv_into(view)
        except OSError:
            return None
        if not count:
            return None
        view = view[count:]
    return data


def _send(channel: socket.socket, message: Any) -> None:
    try:
        channel.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        os._exit(0)  # the driver is gone
