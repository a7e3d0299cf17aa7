"""Standard streams that never stop a run: a reader that is gone, a dead terminal, a full disk, a narrow encoding.

`guard` is the first call of every command. What is written afterwards to sys.stdout and sys.stderr is lost at worst.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

# Nobody will ever read what is written: the pipe's reader has ended, or the terminal is gone.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)


class _Lossy(io.TextIOWrapper):
    """A stream whose writes raise no OSError. After an error of the kind GONE the descriptor leads to /dev/null, so
    that libraries that write to it do not fail either. After other errors (a full disk) the text waits in the buffer.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno in GONE:
            _lead_nowhere(self.fileno())
            with suppress(OSError):
                super().flush()  # what is left in the buffer


def guard() -> None:
    """Make sys.stdout and sys.stderr tolerant of every error, and open /dev/null in place of closed descriptors 0 to 2.

    Without the latter, the next file or socket would get a number of these, and children would read and write it.
    Lines are written at once, so that a file of both streams has them in order and shows a slow command's progress.
    Streams that somebody has replaced (a test, a notebook) stay. Characters outside the stream's encoding are written
    as escapes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _lead_nowhere(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (it lives as long as the process)
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _tolerant(sys.stdout, 1)  # type: ignore[misc]
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _tolerant(sys.stderr, 2)  # type: ignore[misc]


def write_error(text: str) -> None:
    """Write to standard error at once. For signal handlers, in which print() is not safe."""
    with suppress(OSError):
        os.write(2, text.encode(sys.stderr.encoding if sys.stderr else "utf-8", "backslashreplace"))


def _tolerant(stream: TextIO | None, descriptor: int) -> _Lossy:
    encoding = stream.encoding if stream else "utf-8"
    if stream:
        with suppress(OSError):
            stream.flush()
    raw = io.FileIO(descriptor, "wb", closefd=False)
    return _Lossy(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace",
        line_buffering=True, write_through=bool(os.environ.get("PYTHONUNBUFFERED")),
    )  # fmt: skip


def _lead_nowhere(descriptor: int) -> None:
    """Have a descriptor lead to /dev/null."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
