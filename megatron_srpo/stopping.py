"""How a run is asked to stop: Ctrl-C (SIGINT) and SIGTERM.

Outside the loop both end the process at once, by the system's own action: nothing is lost, and there is no traceback.
Inside it, the first one asks for a clean stop at the end of the iteration and another one ends the process at once.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 2.0
TORCHRUN_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's variable, seconds; or its option --shutdown-timeout


class StopRequest:
    """Calling it says whether a stop was asked for. `speaks`: this rank tells the user what happens.

    torchrun passes a first Ctrl-C on as SIGINT and a second one as SIGTERM. A cluster's manager that signals all
    processes reaches a rank twice for one request, directly and through torchrun: the same signal within
    SAME_REQUEST_SECONDS counts once.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._asked_at: float | None = None  # monotonic seconds

    def __call__(self) -> bool:
        return self._asked_at is not None

    def install(self) -> None:
        """Take the signals over; from here on the loop answers them."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            for other in SIGNALS:
                if other != number or not _under_torchrun():
                    signal.signal(other, signal.SIG_DFL)  # ends the process also while it waits inside a collective
            if self._speaks:
                os.write(2, f"\n{_what_happens()}\n".encode())  # print() is not safe in a signal handler
        elif time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _what_happens() -> str:
    text = "stopping: this iteration is finished and saved first; Ctrl-C again stops at once"
    if not _under_torchrun():
        return text
    seconds = os.environ.get(TORCHRUN_PATIENCE, "30")
    return f"{text}. torchrun waits {seconds} s for it, unless started with --shutdown-timeout SECONDS"
