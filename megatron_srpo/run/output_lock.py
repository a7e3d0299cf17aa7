"""One run at a time in an output folder.

The driver holds a lock on a file in it for as long as it lives; the system frees it however the process ends, also by
SIGKILL. So there is no stale lock to remove.
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
    """Held until `release`, the end of its `with` block, or the end of the process. UserError if another run has it."""

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
            return  # a file system without locks: the run goes on without one
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
