"""The CPU time of a training job from the start of its process to its first iteration, and whose it is.

    python -m benchmarks.start [key=value …]

A model of almost no size on one rank; `key=value` changes the configuration, as in `rollout.placement=servers`. Imports
are those of all packages, ours too, whenever they happen. What is left after imports, process groups, model and engine
is ours: settings, checks, prompts, reward workers, the comparison of trainer and engine (which generates and scores),
and the log. Seconds are those of this process's processors. The last figure is of the clock, and so counts the start of
servers, which are other processes.
"""

from __future__ import annotations

import builtins
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Phase → the function that is all of it. A phase inside another one counts for itself alone.
PHASES = {
    "process groups": ("megatron_srpo.mcore.groups", "initialize"),
    "Megatron's model and optimizer": ("megatron_srpo.run.assembly", "build_policy"),
    "vLLM engine": ("megatron_srpo.rollout.vllm.start", "start_engine"),
    "comparison of trainer and engine": ("megatron_srpo.run.start_check", "check_start"),
    "reward workers": ("megatron_srpo.run.assembly", "build_scorer"),
    "prompts": ("megatron_srpo.run.launch", "_open_role"),
}
REST = "settings, checks, log and the rest"
NOT_OURS = {"imports", "process groups", "Megatron's model and optimizer", "vLLM engine"}
# Imported by name before it can be wrapped.
ALIASES = {("megatron_srpo.rollout.vllm.colocated", "start_engine")}


class Clock:
    """CPU seconds by phase. The phase that is entered last gets the time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = [REST]
        self._since = time.process_time()
        self._wrapped: set[tuple[str, str]] = set()
        self._import = builtins.__import__
        builtins.__import__ = self._timed_import

    def enter(self, phase: str) -> None:
        self._count()
        self._open.append(phase)

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def _timed_import(self, *given: Any, **named: Any) -> Any:
        if self._open[-1] == "imports" or threading.current_thread() is not threading.main_thread():
            return self._import(*given, **named)
        self.enter("imports")
        try:
            return self._import(*given, **named)
        finally:
            self._wrap()
            self.leave()

    def _wrap(self) -> None:
        """Time the phases whose modules have been imported."""
        places = [(place, phase) for phase, place in PHASES.items()]
        places += [(place, phase) for place in ALIASES for phase, (_, name) in PHASES.items() if name == place[1]]
        for (module, name), phase in places:
            if (module, name) not in self._wrapped and hasattr(sys.modules.get(module), name):
                self._wrapped.add((module, name))
                setattr(sys.modules[module], name, self._timed(phase, getattr(sys.modules[module], name)))

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            self.enter(phase)
            try:
                return function(*given, **named)
            finally:
                self.leave()

        return timed


class Started(BaseException):
    """The first iteration begins."""


def main() -> None:
    begun = time.process_time()  # what Python and this module took
    from megatron_srpo.core.loopback import ADDRESS
    from megatron_srpo.rollout.vllm.server_process import free_port
    from tests.tiny_run import make_run

    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESS, "MASTER_PORT": str(free_port(ADDRESS)),
    }  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        config = make_run(Path(folder))
        prepared = time.process_time() - begun
        clock, started = Clock(), time.perf_counter()
        from megatron_srpo.run.cli import main as command
        from megatron_srpo.trainer import Trainer

        found: dict[str, float] = {}
        waited: list[float] = []

        def stop(trainer: Trainer) -> None:
            found.update(clock.seconds)  # what follows is the end of the process
            waited.append(time.perf_counter() - started)
            raise Started

        Trainer.run = stop  # type: ignore[method-assign]
        with suppress(Started):
            command(["train", str(config), "run.iterations=1", *sys.argv[1:]])
    for phase, seconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"RESULT {phase}: {seconds:.3f} CPU s")
    ours = sum(seconds for phase, seconds in found.items() if phase not in NOT_OURS)
    print(f"RESULT ours together: {ours:.3f} CPU s")
    print(f"RESULT until the first iteration: {waited[0]:.1f} s of the clock")
    print(f"(before it: {prepared:.1f} CPU s for the libraries with which this benchmark makes its model)")


if __name__ == "__main__":
    main()
