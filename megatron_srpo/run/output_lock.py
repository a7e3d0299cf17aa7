"""Allows one run at a time in an output folder.

Rank 0 holds a lock (flock) on a file in the folder. The operating system releases it however the process ends, also
after SIGKILL, so that nobody ever has to remove a stale lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from megatron_srpo.core.errors import UserError

LOCK_FILE = "run.lock"


class OutputLock:
    """Makes the folder and locks it, until `release`, the end of the `with` block, or the end of the process.

    Raises UserError, which names the other process, if another run holds the lock; OSError if the folder cannot be
    written. A file system without locks is accepted, and nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lost = folder, False
        self._file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{folder} is in use by another run ({owner or 'unknown'}). Stop that one, or choose another folder: "
                "--run.output_dir FOLDER"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def renew(self, warn: Callable[[str], None]) -> None:
        """Lock the folder again if somebody has deleted or replaced it, or the lock's file, since it was locked. `warn`
        gets a message. Raises UserError if another run has the new one."""
        try:
            if os.path.samestat(os.stat(self._folder / LOCK_FILE), os.fstat(self._file)):
                self._lost = False
                return
        except FileNotFoundError:
            pass
        except OSError:
            return  # a mount that fails: writing checkpoints tells
        try:
            new = OutputLock(self._folder)
        except UserError:
            raise
        except OSError as error:
            if not self._lost:
                warn(f"{self._folder} was deleted, and cannot be made again ({error.strerror}); it is tried again")
            self._lost = True
            return
        self.release()
        self._file, new._file, self._lost = new._file, -1, False
        warn(
            f"{self._folder}, or the lock file in it, was deleted or replaced while this run writes to it. The run has "
            "locked it again and goes on. What was deleted is lost; the next checkpoint is written at its usual time"
        )

    def release(self) -> None:
        """Release the lock. It may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
