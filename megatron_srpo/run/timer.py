"""How long each phase of an iteration takes on this rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class PhaseTimer:
    """Adds up seconds by phase until `restart`. `watch` is told which phase this rank is in (Watchdog.phase)."""

    def __init__(self, watch: Callable[[str], AbstractContextManager[None]]) -> None:
        self._watch, self._iteration = watch, 0
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._seconds: dict[str, float] = {}

    def restart(self, iteration: int) -> None:
        """Begin iteration number `iteration`, counted from 1."""
        self._iteration, self._started, self._seconds = iteration, time.perf_counter(), {}
        self._cpu_started = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the block this rank is in phase `name`."""
        started = time.perf_counter()
        try:
            with self._watch(f"iteration {self._iteration}, {name}"):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, those of the whole iteration so far as "step", and this process's CPU seconds as "cpu"."""
        whole = {"step": time.perf_counter() - self._started, "cpu": time.process_time() - self._cpu_started}
        return {**self._seconds, **whole}
