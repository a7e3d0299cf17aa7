"""A server that an environment class starts for its episodes, in the program in which environments run.

It lives as long as the program. If it ends by itself, the program ends with it, says why, and both are started again:
`worker.py` watches it. Only what `prepare` starts here is watched, not what a library starts for itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.exit_codes import exit_words
from megatron_srpo.core.output_log import last_words

HOST = "127.0.0.1"
START_SECONDS = 120.0
POLL_SECONDS = 0.1
MOST_SAID = 2**20  # bytes of what a server prints, then it is forgotten
READ_BYTES = 2**14  # of it, for its last words


@dataclass
class Server:
    """A server that runs. `said`: a file without a name, with what it prints."""

    line: str  # its command line
    said: IO[bytes]

    def last_words(self) -> str:
        """The last lines that it has printed, as a part of a message; "" if it has printed nothing."""
        size = os.fstat(self.said.fileno()).st_size
        words = last_words(os.pread(self.said.fileno(), READ_BYTES, max(0, size - READ_BYTES)).decode(errors="replace"))
        return f". It said: {words}" if words else ""

    def forget_much(self) -> None:
        """Empty the file if it has grown too large: a server may print a line for each request of a long run."""
        if os.fstat(self.said.fileno()).st_size > MOST_SAID:
            self.said.truncate(0)  # it is open for appending, so the next line is at its beginning


_running: dict[int, Server] = {}  # by pid


def start_server(command: Sequence[str]) -> int:
    """Start a command, in which "{port}" stands for a port of loopback, and wait until something listens there.

    Returns the port. UserError if there is no such program, or if it ends or does not listen in START_SECONDS.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command]
    line = shlex.join(words)
    said = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the server
    fcntl.fcntl(said, fcntl.F_SETFL, os.O_APPEND)
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, preexec_fn=die_with_parent
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"the server {line!r} cannot be started: {error}") from error
    server = Server(line, said)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                _running[process.pid] = server
                return port
        time.sleep(POLL_SECONDS)
    how = f"has not listened on {HOST}:{port} in {START_SECONDS:g} s; does the command use {{port}}?"
    if process.poll() is None:
        process.kill()
        process.wait()
    else:
        how = f"ended: {exit_words(process.returncode)}"
    raise UserError(f"the server {line!r} {how}{server.last_words()}")


def die_with_parent() -> None:
    """Linux: end this process when its parent ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def uses_server() -> bool:
    """Whether this program, or the one that has forked it, has started a server."""
    return bool(_running)


def server_of(pid: int) -> Server | None:
    """The server that has this number, None if it is none of ours."""
    return _running.get(pid)


def forget_much() -> None:
    """Keep what the servers print small."""
    for server in _running.values():
        server.forget_much()
