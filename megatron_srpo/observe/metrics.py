"""Writes and reads metrics.jsonl: one JSON object in each line, with "step" first.

Every line is valid JSON: numbers that JSON cannot express become the strings "NaN", "Infinity" and "-Infinity", which
Python's float() reads. Logging never stops training: when the disk is full, lines wait in memory and are written when
there is room again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from megatron_srpo.core.atomic import set_aside
from megatron_srpo.core.json_types import JsonValue

METRICS_FILE = "metrics.jsonl"  # in a run's folder
WAITING_LINES = 10_000  # lines kept in memory while the file cannot be written; the oldest are dropped first


def json_line(step: int, metrics: Mapping[str, object]) -> str:
    """One line of metrics.jsonl, without the line break."""
    record = {"step": step} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes JSON's own escape


def _plain(value: object) -> JsonValue:
    """A value that JSON can express. 0-d tensors and numpy numbers become Python numbers."""
    if isinstance(value, str | bool) or value is None:
        return value
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return value
    # Asking for the protocol costs more than everything else here.
    assert isinstance(value, float | SupportsFloat), f"{type(value).__name__} is no JSON value"
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl. An incomplete last line, which a killed process leaves, is skipped."""
    with path.open("rb") as file:
        for line in file:
            record = _record(line)
            if record is not None:
                yield record


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None if it has none."""
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _end_of(path: Path, step: int) -> int:
    """Bytes of the file up to the first line of a later step. An incomplete last line does not count."""
    end = offset = 0
    with path.open("rb") as file:
        for line in file:
            offset += len(line)
            record = _record(line)
            if record is not None and record["step"] > step:
                break
            if record is not None and line.endswith(b"\n"):
                end = offset
    return end


class JsonlWriter:
    """Appends records to a file; `log` returns when the record is written. `warn` gets a message about each failure."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._waiting: deque[bytes] = deque(maxlen=WAITING_LINES)
        self._file: int | None = None
        self._failing = False

    def resume(self, step: int) -> None:
        """Prepare the file for a run that continues after `step`: it is cut off before the first line of a later step.

        A run that starts at step 0 gets a new file; an earlier run's file becomes metrics.previous.1.jsonl, or the next
        free number.
        """
        self.close()
        try:
            if not self._path.exists():
                return
            if step == 0:
                set_aside(self._path)
                return
            end = _end_of(self._path, step)
            if end < self._path.stat().st_size:
                os.truncate(self._path, end)
        except OSError as error:
            self._report(error)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write one record. If that fails, the record is kept and written with the next one."""
        self._waiting.append((json_line(step, metrics) + "\n").encode())
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._report(error)
            return
        if self._failing:
            self._failing = False
            self._warn(f"{self._path}: writing again, with the lines that waited")

    def close(self) -> None:
        """Close the file, after one more attempt to write the lines that wait."""
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._warn(f"{self._path}: {len(self._waiting)} lines could not be written ({error})")
        try:
            self._close_file()
        except OSError as error:
            self._warn(f"{self._path}: the last lines may be lost ({error})")

    def _append(self, line: bytes) -> None:
        """Write the whole `line`, or nothing of it."""
        if self._file is not None and not self._is_there(self._file):
            self._close_file()
            self._warn(f"{self._path} was deleted or replaced; it is continued with this line")
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            with contextlib.suppress(OSError):
                self._close_file()
            raise

    def _is_there(self, file: int) -> bool:
        """Whether the path still names the open file. A folder that is deleted keeps open files writable, unseen."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):  # NFS: another host has deleted it
                return False
            raise

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None  # a close that fails, as on NFS, has closed it all the same
            os.close(file)

    def _report(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            self._warn(f"{self._path}: cannot be written ({error}); training goes on and it is tried again each time")
