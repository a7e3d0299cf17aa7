"""One reward worker, seen from the driver: start it, give it a chunk, read its results, end it.

A worker is a fresh interpreter that runs `worker.main`, not a fork and not a multiprocessing child: the driver's memory
(models, engines) is not duplicated, its threads and locks are not copied, and its __main__ is not imported again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from megatron_srpo.rewards.worker import Setup, encode

START_SECONDS = 120.0  # imports of the user's functions included
SEND_SECONDS = 30.0  # an idle worker reads at once; one that does not is broken
STOP_SECONDS = 1.0
TAIL_BYTES = 2048  # of what the worker printed, for the message when it dies

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_srpo.rewards.worker import main; main(int(sys.argv[2]))"
)


class WorkerProcess:
    """`ready` after its functions are imported; `pending` are the tasks (the caller's numbers) of its chunk, the one it
    works on first; past `deadline` (monotonic seconds) it hangs."""

    def __init__(self, setup: Setup) -> None:
        self.ready = False
        self.pending: list[int] = []
        self.deadline: float | None = time.monotonic() + START_SECONDS
        self._timeout = setup.timeout_seconds
        self._received = b""
        self._tail = b""
        self.channel, child = socket.socketpair()
        with child:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(_search_path()), str(child.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(child.fileno(),),
                start_new_session=True,  # Ctrl-C is the driver's alone; and its children end with it
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.channel.settimeout(SEND_SECONDS)
        with suppress(OSError):  # it died at once: the end of its channel will say so
            self.channel.sendall(encode(setup))

    @property
    def idle(self) -> bool:
        return self.ready and not self.pending

    def assign(self, numbers: list[int], tasks: list[tuple]) -> None:
        """Send a chunk: `tasks[i]` = (kind, response, answer, metadata) is the caller's `numbers[i]`. OSError: it is
        dead or deaf."""
        self.pending = list(numbers)
        self.deadline = time.monotonic() + self._timeout
        self.channel.sendall(encode(tasks))

    def read(self) -> list[Any] | None:
        """The messages that arrived; None at the end of the channel, which is the worker's. Call when readable.

        A task's deadline runs from the result before it.
        """
        try:
            data = self.channel.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def take_first(self) -> int:
        """The task whose result has just come; the next one's time starts."""
        number = self.pending.pop(0)
        self.deadline = time.monotonic() + self._timeout if self.pending else None
        return number

    def drain_output(self) -> bool:
        """Drop what the worker printed, but for its end; False when it will print no more. Call when readable."""
        try:
            data = os.read(self.output.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        return bool(data)

    def end(self) -> str:
        """End it and its children, now; returns how it ended, e.g. "killed by SIGSEGV", with its last printed line."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # at the end of its channel it is about to exit: that code is the one to report
        code = self._process.poll()
        self._kill()
        while self.drain_output() and self._printed_more():
            pass
        self._close()
        how = "killed" if code is None else f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
        last = self._tail.decode(errors="replace").strip().splitlines()[-1:]
        return f"{how}: {last[0][:200]}" if last else how

    def kill(self) -> None:
        """End it and its children, now."""
        self._kill()
        self._close()

    def hang_up(self) -> None:
        """Ask an idle worker to end; `kill` afterwards collects it."""
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _printed_more(self) -> bool:
        import select

        return bool(select.select([self.output], [], [], 0)[0])

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session: children that a reward function left too
        self._process.wait()

    def _close(self) -> None:
        self.channel.close()
        self.output.close()


def _search_path() -> list[str]:
    """The driver's module search path, with the working directory, where users keep their reward functions."""
    here = os.getcwd()
    path = list(dict.fromkeys(os.path.abspath(entry or here) for entry in sys.path))
    return path if here in path else [*path, here]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
