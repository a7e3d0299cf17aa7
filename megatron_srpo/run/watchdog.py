"""Prints where every rank is when a run makes no progress.

Each rank watches itself, because a rank that hangs in a collective, in an engine or in a user's code cannot answer.
When a phase lasts longer than the limit, the rank prints its phase and the stacks of its threads, and prints them again
after each further limit. It never ends anything. In a job that hangs, all ranks print within the same minutes; the rank
whose phase differs from the others is the one to look at. Time is taken from the monotonic clock.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

BETWEEN = "between phases"
# faulthandler's timer runs in C, so it also fires while code holds the interpreter lock and no Python thread can run.
# It fires this many limits after the watchdog's own thread has run last, which prints more.
C_TIMER_LIMITS = 1.5


class Watchdog:
    """Reports a phase that lasts longer than `limit` seconds; 0 switches it off. `now` returns monotonic seconds."""

    def __init__(self, limit: float, *, rank: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._rank, self._now = limit, rank, now
        self._lock = threading.Lock()
        self._phase, self._since, self._reports = BETWEEN, now(), 0
        self._stop = threading.Event()
        if limit:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the block the rank is in phase `name`. Phases may be nested."""
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        with self._lock:
            self._phase, self._since, self._reports = name, self._now(), 0

    def check(self) -> str | None:
        """The report that is due now, one for each limit that has passed; None if none is due."""
        with self._lock:
            waited = self._now() - self._since
            times = int(waited / self._limit) if self._limit else 0
            if times <= self._reports:
                return None
            self._reports = times
            return (
                f"watchdog: rank {self._rank} (process {os.getpid()}) has been in {self._phase!r} for "
                f"{waited / 60:.1f} minutes; its threads:"
            )

    def _watch(self) -> None:
        while not self._stop.is_set():
            # Setting the timer starts a thread in C, which costs too much at every phase.
            faulthandler.dump_traceback_later(self._limit * C_TIMER_LIMITS, repeat=True, file=_standard_error())
            if self._stop.wait(min(self._limit / 4, 15.0)):
                break
            text = self.check()
            if text:
                with suppress(OSError):  # a full disk must not end the watchdog
                    print(text, file=sys.__stderr__, flush=True)
                faulthandler.dump_traceback(file=_standard_error(), all_threads=True)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._limit:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()


def _standard_error() -> TextIO:
    """The process's own standard error, also where a test or a library has replaced sys.stderr."""
    assert sys.__stderr__ is not None
    return sys.__stderr__
