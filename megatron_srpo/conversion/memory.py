"""Peak host memory of this process, measured while it works."""

from __future__ import annotations

import os
import threading
from pathlib import Path

INTERVAL_SECONDS = 0.002
_PAGE = os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: what the kernel cannot drop. Mapped weight files do not count."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE


class PeakMemory:
    """Samples in a thread inside the block; `peak` is the most above its start, in bytes."""

    def __enter__(self) -> PeakMemory:
        self._start = self._most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._most = max(self._most, anonymous_bytes())

    @property
    def peak(self) -> int:
        return self._most - self._start
