"""Signals that stop a run: Ctrl-C (SIGINT), SIGTERM, SIGHUP (the terminal or the ssh connection is gone), and SIGUSR1
from a cluster that will start the run again.

Before the training loop starts, SIGINT and SIGTERM end the process at once: nothing is lost, and no traceback is shown.
Inside the loop the first of them asks for a clean stop at the end of the iteration, and a second one ends the process
at once. SIGUSR1 asks for the same clean stop, and the run then exits with exit_codes.REQUEUE. SIGUSR1 never ends a
process by itself: it stays blocked (`hold_requeue`), and the loop checks whether one is pending. Therefore a request
that arrives during startup is not lost, and a cluster manager may send it to every process of a job, helpers included,
as often as it likes. SIGHUP is treated in the same way, because the system sends it to helpers too, and more than once;
the run then exits with exit_codes.STOPPED. Under nohup it stays ignored.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from megatron_srpo.core import exit_codes
from megatron_srpo.core.streams import write_error

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEUE = signal.SIGUSR1
HANGUP = signal.SIGHUP
SAME_REQUEST_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# How many seconds torchrun waits for its ranks before it kills them; its option --shutdown-timeout sets it too.
TORCHRUN_SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"

SignalHandler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None  # as signal.signal returns it


def hold_requeue() -> None:
    """Block SIGUSR1 so that it stays pending, in this thread, in the threads it starts and in its child processes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {REQUEUE})


def hold_hangup() -> set[signal.Signals]:
    """Block SIGHUP in the same way. Returns {SIGHUP}, or nothing if it is ignored (nohup)."""
    if signal.getsignal(HANGUP) is signal.SIG_IGN:
        return set()  # blocked, it would become pending even though it is ignored
    signal.pthread_sigmask(signal.SIG_BLOCK, {HANGUP})
    return {HANGUP}


def end_with_launcher() -> None:
    """Have Linux send SIGTERM to this rank when torchrun ends. A killed torchrun would otherwise leave ranks that go on
    training and hold GPUs, ports and the run's folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopDuringStartup:
    """A `with` block around a run: until the training loop starts, SIGINT and SIGTERM print one line (if `prints`) and
    end the process with exit_codes.STOPPED, whatever the main thread is doing.

    Python runs signal handlers between two instructions of the main thread, which may be inside a library for minutes.
    But the C half of the handler writes the signal's number to a pipe at once, and a thread that reads the pipe ends
    the process.
    """

    def __init__(self, *, prints: bool) -> None:
        self._prints = prints

    def __enter__(self) -> StopDuringStartup:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before: dict[signal.Signals, SignalHandler] = {
            number: signal.signal(number, lambda *unused: None) for number in taken
        }
        self._thread = threading.Thread(target=self._wait, name="stop during startup", daemon=True)
        self._thread.start()
        return self

    def _wait(self) -> None:
        while received := os.read(self._read_end, 1):
            if received[0] not in SIGNALS:
                continue
            if self._prints:
                write_error("\nstopped before the first iteration: there is nothing to save\n")
            os._exit(exit_codes.STOPPED)

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)


class StopRequest:
    """Calling it returns whether somebody asked the run to stop. If `speaks`, this rank prints what happens next.

    torchrun passes the first Ctrl-C on as SIGINT and the second one as SIGTERM. A cluster manager that signals all
    processes reaches each rank twice, directly and through torchrun, so the same signal within SAME_REQUEST_SECONDS
    counts once.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._asked_at: float | None = None  # monotonic seconds

    def __call__(self) -> bool:
        return self._asked_at is not None or self.requeue or HANGUP in signal.sigpending()

    @property
    def requeue(self) -> bool:
        """Whether a SIGUSR1 has arrived since `hold_requeue`."""
        return REQUEUE in signal.sigpending()

    def install(self) -> None:
        """Install the handlers: from here on the training loop reacts to the signals."""
        signal.set_wakeup_fd(-1)  # StopDuringStartup no longer ends the process
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            for other in SIGNALS:
                if other != number or not _under_torchrun():
                    signal.signal(other, signal.SIG_DFL)  # it then ends the process even inside a collective
            if self._speaks:
                write_error(f"\n{_stop_message()}\n")
        elif time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _stop_message() -> str:
    text = "stopping: this iteration is finished and saved first; Ctrl-C again stops at once"
    if not _under_torchrun():
        return text
    seconds = os.environ.get(TORCHRUN_SHUTDOWN_TIMEOUT, "30")
    return f"{text}. torchrun waits {seconds} s for it, unless started with --shutdown-timeout SECONDS"
