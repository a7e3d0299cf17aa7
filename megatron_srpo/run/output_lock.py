"""Allows one run at a time in an output folder.

Rank 0 holds a lock (flock) on a file in the folder. The operating system releases it however the process ends, also
after SIGKILL, so that nobody ever has to remove a stale lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
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

    def release(self) -> None:
        """Release the lock. It may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
