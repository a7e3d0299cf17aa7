"""The program of a reward worker: it reads chunks of tasks and writes the result of each task as soon as it has it.

It talks to the driver over a socket. The driver sends 8 bytes with a length, then a pickle: first the Setup, then
chunks. The worker sends one line of JSON for each task, so that nothing that a reward function does can make the driver
execute anything. The driver reads and discards the worker's standard output. This module imports neither torch nor
anything that imports it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_srpo.core.user_code import limit_memory, place, print_line_by_line
from megatron_srpo.rewards.registry import RewardError, RewardFunction, as_verdict, resolve

HEADER_BYTES = 8
# The driver enforces the time-out of a task. A worker that is still busy this many seconds later has lost its driver.
ORPHAN_SECONDS = 5
ERROR_LIMIT = 500  # characters


@dataclass(frozen=True)
class Setup:
    """The first message to a worker."""

    kinds: tuple[str, ...]
    functions: dict[str, str]  # the user's own functions: kind → reference
    timeout_seconds: float
    memory_mib: int  # limit of the address space above what the worker has at its start; 0 means no limit
    environment: tuple[str, ...] = ()  # names of the variables that the user lets the worker inherit


_to_json = json.dumps  # kept here, because a reward function may replace it in the module

Task = tuple[str, str, object, dict[str, object]]  # (kind, response, answer, metadata)


class Result(NamedTuple):
    """The worker's answer to one task, sent as a JSON list. Without a score there is an error."""

    score: float | None = None
    feedback: str | None = None
    well_formed: bool | None = None
    prediction: str | None = None
    error: str | None = None


def encode(message: Setup | list[Task]) -> bytes:
    """A message to a worker, with its header."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def main(descriptor: int) -> None:
    """Serve the driver at the other end of the socket until the driver closes it. Never returns."""
    channel = socket.socket(fileno=descriptor)
    print_line_by_line()
    setup = _receive(channel)
    if setup is not None:
        functions = _resolve_all(channel, setup)
        if functions is not None:
            limit_memory(setup.memory_mib)
            _send(channel, {"ready": "yes"})
            _serve(channel, functions, setup.timeout_seconds)
    os._exit(0)  # at once, even if the user's functions started threads


def score_one(function: RewardFunction, response: str, answer: object, metadata: dict[str, object]) -> Result:
    """Call the function; whatever it raises becomes the result's error."""
    try:
        return Result(*as_verdict(function(response, answer, metadata)))
    except MemoryError:
        return Result(error="crash: out of memory (reward.memory_mib limits it)")
    except RewardError as error:
        text = str(error)
    except BaseException as error:  # SystemExit too: a reward function must not end the worker
        text = f"{type(error).__name__}: {error}"[:ERROR_LIMIT] + place(error)
    return Result(error=f"exception: {text[: 2 * ERROR_LIMIT]}")


def _resolve_all(channel: socket.socket, setup: Setup) -> dict[str, RewardFunction] | None:
    try:
        return {kind: resolve(kind, setup.functions) for kind in setup.kinds}
    except RewardError as error:
        _send(channel, {"failed": str(error)})
    except BaseException as error:
        _send(channel, {"failed": f"{type(error).__name__}: {error}"})
    return None


def _serve(channel: socket.socket, functions: dict[str, RewardFunction], timeout_seconds: float) -> None:
    # The alarm ends a worker that hangs after its driver was killed. Its default action runs no Python code, so that it
    # works inside a C extension too.
    alarm, worker = math.ceil(timeout_seconds) + ORPHAN_SECONDS, os.getpid()
    while (chunk := _receive(channel)) is not None:
        for kind, response, answer, metadata in chunk:
            signal.alarm(alarm)
            result = score_one(functions[kind], response, answer, metadata)
            if os.getpid() != worker:  # a process that the function has forked returns here too
                os._exit(0)
            _send(channel, result)


def _receive(channel: socket.socket) -> Any:
    """The next message, a Setup or a list of Tasks; None if the driver has ended."""
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


def _send(channel: socket.socket, message: Result | dict[str, str]) -> None:
    try:
        channel.sendall(_to_json(message).encode() + b"\n")
    except OSError:
        os._exit(0)  # the driver has ended
