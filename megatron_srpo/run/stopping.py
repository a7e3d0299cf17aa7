"""How a run is asked to stop: Ctrl-C (SIGINT) and SIGTERM, and SIGUSR1 for a stop that a cluster goes on from.

Outside the loop the first two end the process at once: nothing is lost, and there is no traceback. Inside it, the
first one asks for a clean stop at the end of the iteration and another one ends the process at once. SIGUSR1 asks for
the same clean stop, and the run then ends with exit_codes.REQUEUE. It never ends a process by itself: it is held back
(`hold_requeue`), and the loop looks whether one has come. So a request during the start is kept, and a cluster's
manager may send it to every process of a job, helpers included, as often as it likes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

from megatron_srpo.core import exit_codes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEUE = signal.SIGUSR1
SAME_REQUEST_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
TORCHRUN_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's variable, seconds; or its option --shutdown-timeout


def hold_requeue() -> None:
    """SIGUSR1 stays pending, in this thread, in those that it starts, and in every process started from it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {REQUEUE})


def end_with_launcher() -> None:
    """Ask this rank to stop when torchrun is gone (Linux): one that was killed leaves ranks that train on unseen, and
    hold GPUs, ports and the run's folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class EarlyStop:
    """A `with` block around a run: SIGINT and SIGTERM before its loop are one line, and the end of the process with
    exit_codes.STOPPED, wherever it is.

    Python's own handlers run between two instructions of the main thread, which may be inside a library for minutes.
    The system's part of them writes into a pipe at once, and a thread that waits there ends the process.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks

    def __enter__(self) -> EarlyStop:
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda *unused: None) for number in taken}
        self._thread = threading.Thread(target=self._wait, name="early stop", daemon=True)
        self._thread.start()
        return self

    def _wait(self) -> None:
        while heard := os.read(self._ears, 1):
            if heard[0] not in SIGNALS:
                continue
            if self._speaks:
                os.write(2, b"\nstopped before the first iteration: there is nothing to save\n")
            os._exit(exit_codes.STOPPED)

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._mouth)
        self._thread.join()
        os.close(self._ears)


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
        return self._asked_at is not None or self.requeue

    @property
    def requeue(self) -> bool:
        """Whether SIGUSR1 has come since `hold_requeue`."""
        return REQUEUE in signal.sigpending()

    def install(self) -> None:
        """Take the signals over; from here on the loop answers them."""
        signal.set_wakeup_fd(-1)  # the end of EarlyStop's part
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
