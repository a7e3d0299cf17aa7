"""The driver's side of one reward worker: start it, give it a chunk of tasks, read its results, end it.

A worker is a fresh interpreter that runs `worker.main`, not a fork and not a multiprocessing child. So the driver's
memory (models, engines) is not duplicated, its threads and locks are not copied, and its __main__ is not imported.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO

from megatron_srpo.core.environment import inherited
from megatron_srpo.core.exit_codes import exit_words
from megatron_srpo.core.output_log import OutputLog
from megatron_srpo.rewards.registry import LARGEST_SCORE
from megatron_srpo.rewards.worker import Result, Setup, Task, encode

START_SECONDS = 120.0  # limit for starting a worker, importing the user's functions included
SEND_SECONDS = 30.0  # limit for sending a chunk: an idle worker reads at once
STOP_SECONDS = 1.0  # limit for workers to end by themselves
LONGEST_MESSAGE = 2**20  # bytes; the limits of the texts keep a result far below it
LAST_READS = 64  # of its output when it has ended: a process that it has started may print for ever
# What a worker may print while the driver does other work and does not read it. One that prints more waits, and its
# task may then take too long.
PRINTED_BYTES = 2**20
TAIL_BYTES = 2048  # how much of its last output is kept, for the message when the worker dies

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_srpo.rewards.worker import main; main(int(sys.argv[2]))"
)


class WorkerProcess:
    """`ready`: its functions are imported. `pending`: the tasks of its chunk that have no result, by the caller's
    numbers; it works on the first one. `deadline`: it hangs after this monotonic time; None while it is idle."""

    def __init__(self, setup: Setup, log: OutputLog) -> None:
        """`log` gets what it prints."""
        self.ready, self._log = False, log
        self.pending: list[int] = []
        self.deadline: float | None = time.monotonic() + START_SECONDS
        self._timeout = setup.timeout_seconds
        self._received = b""
        self._junk = ""  # why what it wrote is no message
        self._tail = b""
        self.channel, child = socket.socketpair()
        with child:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(_search_path()), str(child.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(child.fileno(),),
                start_new_session=True,  # Ctrl-C reaches the driver alone, and `kill` reaches the worker's children
                env=inherited(setup.environment) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        assert self._process.stdout is not None
        self.output: IO[bytes] = self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        with suppress(OSError):  # a system may allow less
            fcntl.fcntl(self.output, fcntl.F_SETPIPE_SZ, PRINTED_BYTES)
        self.channel.settimeout(SEND_SECONDS)
        with suppress(OSError):  # it died at once, which reading its channel will show
            self.channel.sendall(encode(setup))

    @property
    def idle(self) -> bool:
        return self.ready and not self.pending

    def assign(self, numbers: list[int], tasks: list[Task]) -> None:
        """Send a chunk; `tasks[i]` has the caller's number `numbers[i]`. OSError if the worker does not read it."""
        self.pending = list(numbers)
        self.deadline = time.monotonic() + self._timeout
        self.channel.sendall(encode(tasks))

    def read(self) -> list[Result | dict[str, str]] | None:
        """The messages that have arrived; None if the worker has closed its channel, because it ended, or if it has
        written something else than messages, which a reward function can do. Call it when the channel is readable."""
        try:
            data = self.channel.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            if len(self._received) > LONGEST_MESSAGE:
                raise ValueError(f"more than {LONGEST_MESSAGE} bytes")
            messages = [self._message(line) for line in lines]
            if sum(isinstance(message, Result) for message in messages) > len(self.pending):
                raise ValueError("more results than tasks")
        except (ValueError, RecursionError) as error:
            self._junk = f"something has written to its channel that is no result ({error})"
            return None
        return messages

    def _message(self, line: bytes) -> Result | dict[str, str]:
        """One message. ValueError for anything else than what `worker` sends in its present state."""
        message = json.loads(line)
        if isinstance(message, list):
            return _result(message)
        if self.ready or not isinstance(message, dict) or not all(isinstance(text, str) for text in message.values()):
            raise ValueError(f"expected a result, got {str(message)[:80]!r}")
        return {name: _expressible(text) for name, text in message.items()}

    def take_first(self) -> int:
        """The task whose result has just arrived. The time of the next one starts."""
        number = self.pending.pop(0)
        self.deadline = time.monotonic() + self._timeout if self.pending else None
        return number

    def drain_output(self) -> bool:
        """Log what the worker printed, and keep its tail. False if it will print no more. Call it when the output is
        readable."""
        try:
            data = os.read(self.output.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if data:
            self._log.write(data)
        return bool(data)

    def end(self) -> str:
        """Kill it and its children. Returns how it ended, e.g. "killed by SIGSEGV", with its last printed line."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # it has closed its channel, so it is about to exit: report that exit code
        code = self._process.poll()
        self._kill()
        self._close()
        if self._junk:
            return self._junk
        how = "killed" if code is None else exit_words(code)
        last = self._tail.decode(errors="replace").strip().splitlines()[-1:]
        return f"{how}: {last[0][:200]}" if last else how

    def kill(self) -> None:
        """Kill it and its children."""
        self._kill()
        self._close()

    def close_channel(self) -> None:
        """Make an idle worker end by itself. Call `kill` afterwards, which also collects its exit status."""
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _printed_more(self) -> bool:
        return bool(select.select([self.output], [], [], 0)[0])

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session, with children that a reward function started
        self._process.wait()

    def _close(self) -> None:
        for _ in range(LAST_READS):
            if not (self._printed_more() and self.drain_output()):
                break
        self.channel.close()
        self.output.close()


def _result(values: list[object]) -> Result:
    """A result with values of the right types. ValueError otherwise."""
    score, feedback, well_formed, prediction, error = values  # ValueError for another number
    texts = (feedback, prediction, error)
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ValueError(f"expected a number as score, got {str(score)[:80]!r}")
    if score is not None and not abs(score) <= LARGEST_SCORE:  # NaN too
        raise ValueError(f"expected a score of at most {LARGEST_SCORE:g}, got {score:g}")
    if not isinstance(well_formed, bool | None) or not all(isinstance(text, str | None) for text in texts):
        raise ValueError("expected texts, and true or false")
    feedback, prediction, error = (_expressible(text) if isinstance(text, str) else None for text in texts)
    if score is None and error is None:
        raise ValueError("expected a score or an error")
    return Result(None if score is None else float(score), feedback, well_formed, prediction, error)


def _expressible(text: str) -> str:
    """The text with its lone surrogates as escapes: UTF-8, and so tokenizers and files, cannot express them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _search_path() -> list[str]:
    """The driver's module search path, and the working directory, where users keep their reward functions."""
    here = os.getcwd()
    path = list(dict.fromkeys(os.path.abspath(entry or here) for entry in sys.path))
    return path if here in path else [*path, here]
