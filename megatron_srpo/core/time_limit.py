"""A time limit for Python code of others, for example a chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeIsUp(Exception):
    """The code has taken longer than its limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside the block, TimeIsUp is raised after so many seconds. It interrupts Python code, but no call of a C
    extension. Outside the main thread, which alone gets signals, there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
