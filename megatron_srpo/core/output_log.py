"""Keeps what the code of users prints in helper processes: a file of limited size, and its last lines for messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

Room = Literal["environments", "rewards"]  # folders of a run's output folder
LARGEST = 2**23  # bytes of a file; an older file of the same size stays beside it
TAIL_BYTES = 4096
SHOWN_LINES, SHOWN_CHARACTERS = 3, 300


class OutputLog:
    """The file is made with the first output. When it is full, it becomes `path`.old, and the old one is dropped.

    `path` None: only the last output is kept, in memory. `warn` gets a line if the disk does not take the output;
    nothing else happens then.
    """

    def __init__(self, path: Path | None = None, warn: Callable[[str], None] = lambda text: None) -> None:
        self.path, self._warn = path, warn
        self.tail = b""
        self._file: int | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append output, as it comes from a pipe."""
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        if self.path is None:
            return
        try:
            if self._file is None:
                self._open(self.path)
                data = f"---- process {os.getpid()} begins\n".encode() + data
            elif self._size > LARGEST:
                self.close()
                os.replace(self.path, f"{self.path}.old")
                self._open(self.path)
            assert self._file is not None
            self._size += os.write(self._file, data)
        except OSError as error:
            self._warn(f"{self.path} cannot be written ({error.strerror}): what user code prints is lost from here on")
            self.close()
            self.path = None

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size

    def last_words(self) -> str:
        """The last lines that tell something, and where the rest is; "" if nothing was printed."""
        words = last_words(self.tail.decode(errors="replace"))
        return f"{words} (log: {self.path})" if words and self.path else words

    def close(self) -> None:
        """Close the file. It may be called again."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # NFS tells of a full disk here, and has closed it all the same
                os.close(file)


def rank_log(output_dir: str, room: Room, rank: int, warn: Callable[[str], None]) -> OutputLog:
    """The log of what user code prints for one rank of a run."""
    return OutputLog(Path(output_dir) / room / f"rank{rank}.log", warn)


def printed_where(output_dir: str) -> str:
    """Where a run's user code has printed, as a part of a message; "" if it has printed nothing."""
    folders = [str(Path(output_dir) / room) for room in get_args(Room) if (Path(output_dir) / room).is_dir()]
    return f"; what user code printed is in {' and '.join(folders)}" if folders else ""


def last_words(text: str) -> str:
    """The last lines of an output that tell something, on one line: those of an error, if there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and not line.startswith("File")] or lines
    return " | ".join(line[:SHOWN_CHARACTERS] for line in telling[-SHOWN_LINES:])
