"""The exit codes of our processes. Python itself ends with 1 after a defect, and prints the traceback."""

from __future__ import annotations

import signal

DONE = 0
MISTAKE = 2  # a mistake of the user, or of the machine, reported in one message; starting again does not help
UNHEALTHY = 69  # a machine failed its check before the run (EX_UNAVAILABLE of sysexits.h)
REQUEUE = 75  # stopped on request after a checkpoint: start the same command again (EX_TEMPFAIL)
LOST = 76  # another rank of the run has ended for a reason of its own
STOPPED = 130  # stopped by Ctrl-C or SIGTERM, after a checkpoint if there was anything to save

TOLD = (MISTAKE, UNHEALTHY, REQUEUE, LOST, STOPPED)  # a process that ends with one of these has printed the reason
FINAL = (MISTAKE, UNHEALTHY, REQUEUE, STOPPED)  # after one of these, do not start the same ranks again at once

SIGNALLED = 128  # a program that passes on how another one ended adds the signal's number to this, as a shell does


def exit_words(code: int) -> str:
    """How a process has ended: "exit code 3", "killed by SIGKILL" for -9, "exit code 137 (SIGKILL)" for 137."""
    if code >= 0:
        name = _signal_name(code - SIGNALLED)
        return f"exit code {code} ({name})" if name else f"exit code {code}"
    return f"killed by {_signal_name(-code) or f'signal {-code}'}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""
