"""A rank that does not move says where it is; one that moves says nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

from megatron_srpo.run.watchdog import Watchdog


def quiet(clock, limit=60.0) -> Watchdog:
    """A watchdog whose thread is not started: the test asks it."""
    watchdog = Watchdog(0, rank=3, now=lambda: clock[0])
    watchdog._limit = limit
    watchdog._stop.set()
    return watchdog


def test_a_phase_beyond_the_limit_is_told_once_a_limit_with_rank_and_phase():
    clock = [0.0]
    watchdog = quiet(clock)
    with watchdog.phase("iteration 5, gen"):
        clock[0] = 59.0
        assert watchdog.check() is None
        clock[0] = 61.0
        told = watchdog.check()
        assert "rank 3 (process " in told and "'iteration 5, gen' for 1.0 minutes" in told
        assert watchdog.check() is None
        clock[0] = 125.0
        assert "2.1 minutes" in watchdog.check()


def test_a_new_phase_starts_the_clock_again_and_the_outer_one_comes_back():
    clock = [0.0]
    watchdog = quiet(clock)
    with watchdog.phase("outer"):
        clock[0] = 50.0
        with watchdog.phase("inner"):
            clock[0] = 100.0
            assert watchdog.check() is None
        clock[0] = 161.0
        assert "'outer' for 1.0 minutes" in watchdog.check()
    clock[0] = 300.0
    assert "between phases" in watchdog.check()


def test_a_clock_that_jumps_is_not_asked(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e12)
    watchdog = Watchdog(0)
    watchdog._limit = 3600.0
    assert watchdog.check() is None


HANGS = {
    "in Python": ("threading.Event().wait()", "been in 'the hanging part' for"),
    "in code that keeps the interpreter's lock": ("ctypes.PyDLL(None).usleep(800_000)", "Timeout (0:00:00"),
}


def test_a_hanging_process_shows_its_stack_also_where_python_threads_cannot_run():
    for hang, words in HANGS.values():
        script = textwrap.dedent(
            f"""
            import ctypes, os, sys, threading
            from megatron_srpo.run.watchdog import Watchdog
            threading.Timer(0.8, lambda: os._exit(0)).start()
            def the_culprit():
                {hang}
            with Watchdog(0.2, rank=7).phase("the hanging part"):
                the_culprit()
            """
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert words in result.stderr, result.stderr
        assert "in the_culprit" in result.stderr
