"""Where the programs of this package begin: a package that is missing is one message, not a traceback."""

from __future__ import annotations

import signal
import sys

from megatron_srpo.core import streams
from megatron_srpo.core.exit_codes import MISTAKE
from megatron_srpo.core.installation import is_ours, missing_module


def main() -> int:
    """The command line `megatron-srpo`, or `python -m megatron_srpo`; returns the exit code."""
    streams.guard()
    # Ctrl-C ends the process at once and without a traceback, until a run's loop takes it over (stopping.py).
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from megatron_srpo.run.cli import main as run
    except ModuleNotFoundError as error:
        return _refuse(error)
    return run()


def torchrun() -> int:
    """The launcher `python -m megatron_srpo.torchrun`; returns the exit code."""
    streams.guard()  # before anything else opens a file
    try:
        from megatron_srpo.run.torchrun import main as run

        return run()
    except ModuleNotFoundError as error:
        return _refuse(error)


def _refuse(error: ModuleNotFoundError) -> int:
    if is_ours(error):
        raise error
    print(f"error: {missing_module(error)}", file=sys.stderr, flush=True)
    return MISTAKE
