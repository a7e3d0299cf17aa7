"""Says where every rank is when nothing moves.

Each rank watches itself: a rank that hangs in a collective, in an engine or in a user's code cannot be asked. When a
phase lasts longer than the limit, the rank prints its phase and the stacks of its threads, and again after each further
limit; nothing is ended. All ranks of a job that hangs do so within the same minutes, and the one that is somewhere else
than the others is the one to look at. Only a monotonic clock is asked.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

BETWEEN = "between phases"
STUCK_FACTOR = 1.5  # of the limit: the C-level timer, for code that does not let Python's threads run


class Watchdog:
    """`phase` marks what this rank does. `limit` in seconds; 0: never says anything."""

    def __init__(self, limit: float, *, rank: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._rank, self._now = limit, rank, now
        self._lock = threading.Lock()
        self._where, self._since, self._told = BETWEEN, now(), 0
        self._stop = threading.Event()
        if limit:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the block the rank is in phase `name`; phases may be nested."""
        outer = self._where
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        with self._lock:
            self._where, self._since, self._told = name, self._now(), 0
        if self._limit and not self._stop.is_set():
            faulthandler.dump_traceback_later(self._limit * STUCK_FACTOR, repeat=True, file=sys.__stderr__)

    def check(self) -> str | None:
        """What there is to say now, once for each limit that has gone by; None if all is well."""
        with self._lock:
            waited = self._now() - self._since
            times = int(waited / self._limit) if self._limit else 0
            if times <= self._told:
                return None
            self._told = times
            return (
                f"watchdog: rank {self._rank} (process {os.getpid()}) has been in {self._where!r} for "
                f"{waited / 60:.1f} minutes; its threads:"
            )

    def _watch(self) -> None:
        while not self._stop.wait(min(self._limit / 4, 15.0)):
            text = self.check()
            if text:
                with suppress(OSError):  # a full disk must not end the watch
                    print(text, file=sys.__stderr__, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._limit:
            faulthandler.cancel_dump_traceback_later()
