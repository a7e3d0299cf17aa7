"""Starts the trainer under torchrun, as a user would, and stops it cleanly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
# One thread a rank: the ranks are the parallelism, and more threads than cores slow all of them down.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LAUNCHER = "torch/distributed/elastic"  # marks the lines that torchrun itself writes
FAILED = ") of binary:"  # … in its line about the first rank that failed; a traceback of torchrun's own follows


class TrainingFailed(RuntimeError):
    """The trainer ended with an error, which it has printed."""


class Interrupted(RuntimeError):
    """The user stopped the run, and the trainer has ended."""


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_command(config: Path, processes: int, overrides: Mapping[str, object] | Sequence[str] = ()) -> list[str]:
    """`torchrun … -m megatron_srpo train CONFIG [--section.key VALUE …]`.

    `overrides` maps dotted keys to values; a sequence is passed on as it is. Module names instead of console scripts,
    because a script's first line cannot name an interpreter in a folder with a space.
    """
    given = overrides
    if isinstance(overrides, Mapping):
        given = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    rendezvous = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [*launcher, *rendezvous, "-m", "megatron_srpo", "train", str(config), *given]


def _echo(stream: IO[bytes], log: Path) -> None:
    """Copies the trainer's stderr to ours and to `log`; what torchrun says of itself goes to the log alone."""
    echo = True
    with log.open("ab") as file:
        for line in stream:
            file.write(line)
            file.flush()
            text = line.decode(errors="replace")
            echo = echo and FAILED not in text and "SignalException" not in text
            if echo and LAUNCHER not in text:
                sys.stderr.write(text)
                sys.stderr.flush()


def run_training(command: Sequence[str], log: Path, stdout: IO[bytes] | None = None) -> None:
    """Runs `command` to its end. Raises TrainingFailed, or Interrupted after a clean stop that Ctrl-C asked for.

    The trainer gets a session of its own, so that one Ctrl-C reaches it once: from here.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        list(command),
        cwd=ROOT,
        env={**ENVIRONMENT, **os.environ},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    echo = threading.Thread(target=_echo, args=(process.stderr, log), daemon=True)
    echo.start()
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise Interrupted("stopped") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        echo.join(timeout=5)
    if status != 0:
        raise TrainingFailed(f"the trainer ended with status {status}; its messages are above and in {log}")


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks for a clean stop and waits for it; a second Ctrl-C ends the trainer's processes at once."""
    print("\nstopping after this iteration (Ctrl-C again: at once) …", file=sys.stderr, flush=True)
    process.send_signal(signal.SIGINT)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()
