"""`python -m megatron_srpo`. The guard matters: saving a checkpoint starts helper processes that import this module."""

import signal
import sys

if __name__ == "__main__":
    from megatron_srpo.core import streams

    streams.guard()
    # Ctrl-C ends the process at once and without a traceback, until a run's loop takes it over (stopping.py).
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from megatron_srpo.run.cli import main
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: this Python ({sys.executable}) has no module {error.name!r}. `make setup` makes an environment "
            "that has everything, in .venv: activate it (. .venv/bin/activate), or start .venv/bin/python"
        )

    sys.exit(main())
