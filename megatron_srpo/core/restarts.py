"""Whether a start with checkpoint.resume = false begins a run, or goes on with the one that the same job has begun.

torchrun and Slurm start a job's ranks again after a fault. Such a start goes on, because the key is about the first
one. But the first one may have been lost before it had begun anything, and an earlier run's checkpoints may still be in
the folder. Therefore a run that begins writes the name of its job into a file of its output folder.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from megatron_srpo.core.atomic import atomic_write

COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
FILE = "begun_by"


def begins_anew(folder: Path, *, resume: bool) -> bool:
    """Whether this start begins a run in the output folder. `resume`: checkpoint.resume."""
    again = any(os.environ.get(name, "0") not in ("", "0") for name in COUNTS)
    return not resume and not (again and _begun_by(folder) == _job())


def note_begin(folder: Path) -> None:
    """Note that this job has begun its run in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / FILE, _job() + "\n", durable=True)


def _begun_by(folder: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return (folder / FILE).read_text(encoding="utf-8").strip()
    return ""


def _job() -> str:
    """What stays the same when this rank is started again: the Slurm job, or the launcher's process."""
    slurm = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {slurm}" if slurm else f"launcher {os.getppid()} on {socket.gethostname()}"
