"""A server that an environment class starts for its episodes, in the program in which environments run.

It lives as long as the program. If it ends by itself, the program ends with it, says why, and both are started again:
`worker.py` watches it. Only what `prepare` starts here is watched, not what a library starts for itself.
"""

from __future__ import annotations

import ctypes
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from megatron_srpo.core.errors import UserError

HOST = "127.0.0.1"
START_SECONDS = 120.0
POLL_SECONDS = 0.1
SHOWN = 500  # characters of what a server said before it ended
_running: dict[int, str] = {}  # pid → command line


def start_server(command: Sequence[str]) -> int:
    """Start a command, in which "{port}" stands for a port of loopback, and wait until something listens there.

    Returns the port. UserError if there is no such program, or if it ends or does not listen in START_SECONDS.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command]
    line = shlex.join(words)
    with tempfile.TemporaryFile() as said:
        try:
            server = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, preexec_fn=die_with_parent
            )
        except OSError as error:
            raise UserError(f"the server {line!r} cannot be started: {error}") from error
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    _running[server.pid] = line
                    return port
            time.sleep(POLL_SECONDS)
        how = f"has not listened on {HOST}:{port} in {START_SECONDS:g} s; does the command use {{port}}?"
        if server.poll() is None:
            server.kill()
            server.wait()
        else:
            how = f"ended with exit code {server.returncode}"
        said.seek(0)
        words_said = said.read()[-SHOWN:].decode(errors="replace").strip()
    raise UserError(f"the server {line!r} {how}" + (f". It said: {words_said}" if words_said else ""))


def die_with_parent() -> None:
    """Linux: end this process when its parent ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def uses_server() -> bool:
    """Whether this program, or the one that has forked it, has started a server."""
    return bool(_running)


def server_of(pid: int) -> str | None:
    """The command line of the server that has this number, None if it is none of ours."""
    return _running.get(pid)
