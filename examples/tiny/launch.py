"""Starts the trainer under torchrun, as a user would, and stops it cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parents[2]
# One thread a rank: the ranks are the parallelism, and more threads than cores slow all of them down.
# vLLM says where it binds memory through torch's C++ log, as a warning.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"
}  # fmt: skip


class TrainingFailed(RuntimeError):
    """The trainer ended with an error, which it has printed. `status`: its exit code."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(RuntimeError):
    """The user stopped the run, and the trainer has ended."""


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_command(config: Path, processes: int, overrides: Mapping[str, object] | Sequence[str] = ()) -> list[str]:
    """torchrun, by the wrapper that adds no report of its own: `-m megatron_srpo train CONFIG [--section.key VALUE …]`.

    `overrides` maps dotted keys to values; a sequence is passed on as it is. Module names instead of console scripts,
    because a script's first line cannot name an interpreter in a folder with a space.
    """
    given = overrides
    if isinstance(overrides, Mapping):
        given = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    launcher = [sys.executable, "-m", "megatron_srpo.torchrun", f"--nproc-per-node={processes}"]
    rendezvous = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [*launcher, *rendezvous, "-m", "megatron_srpo", "train", str(config), *given]


class Training:
    """A trainer that is running. With `quiet` its output goes to the log alone, else also to the terminal.

    It gets a session of its own, so that one Ctrl-C reaches it once: by `stop`.
    """

    def __init__(self, command: Sequence[str], log: Path, quiet: bool = False):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env={**ENVIRONMENT, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=file if quiet else None,
                stderr=file if quiet else subprocess.PIPE,
                start_new_session=True,
            )
        self._echo = threading.Thread(target=_echo, args=(self._process.stderr, log), daemon=True)
        if not quiet:
            self._echo.start()

    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        status = self._process.wait()
        if self._echo.is_alive():
            self._echo.join(timeout=5)
        return status

    def stop(self) -> None:
        """Asks for a clean stop and waits for it; a second Ctrl-C ends all of the trainer's processes at once."""
        try:
            self._process.send_signal(signal.SIGINT)
            self.wait()
        except KeyboardInterrupt:
            family = psutil.Process(self._process.pid)
            for process in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.wait()


def _echo(stream: IO[bytes], log: Path) -> None:
    """Copies the trainer's stderr to ours and to `log`."""
    with log.open("ab") as file:
        for line in stream:
            file.write(line)
            file.flush()
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP do what Ctrl-C does, so that no trainer is left behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_training(command: Sequence[str], log: Path) -> None:
    """Runs `command` to its end. Raises TrainingFailed, or Interrupted after a clean stop that Ctrl-C asked for."""
    with terminate_as_interrupt():
        training = Training(command, log)
        try:
            status = training.wait()
        except KeyboardInterrupt:
            print("\nstopping after this iteration (Ctrl-C again: at once) …", file=sys.stderr, flush=True)
            training.stop()
            raise Interrupted("stopped") from None
    if status != 0:
        raise TrainingFailed(f"the trainer ended with status {status}; its messages are above and in {log}", status)
