"""What a conversion shows: a progress bar, and a summary with its time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_srpo.conversion.report import Report, Tell


def leads() -> bool:
    """Whether this process writes to the terminal."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _progress(title: str) -> Iterator[Tell]:
    """A bar of bytes on stderr, from the first call on; other processes show nothing."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), disable=not leads())
    tasks: list[TaskID] = []

    def tell(done: int, total: int) -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task(title))
        bar.update(tasks[0], completed=done, total=total)

    try:
        yield tell
    finally:
        if tasks:
            bar.stop()


def converted(out: Path, convert: Callable[[Tell | None], Report], *, dry_run: bool) -> int:
    """Run a conversion and tell its result; returns the exit code."""
    start = time.perf_counter()
    if dry_run:
        report = convert(None)
        if leads():
            print(*report.lines, sep="\n")
            print(f"dry run: {report.tensors} {report.what}, {_mb(report.nbytes)}; nothing was written")
        return 0
    with _progress(out.name) as tell:
        report = convert(tell)
    if leads():
        print(
            f"{out}: {report.tensors} {report.what}, {_mb(report.nbytes)}, in {time.perf_counter() - start:.1f} s\n"
            f"peak host memory {_mb(report.peak)} above the start of the conversion; one layer and the largest tensor "
            f"are {_mb(report.bound)}"
        )
        if report.equal_to:
            print(f"every tensor equals that of {report.equal_to}, bit for bit")
    return 0


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
