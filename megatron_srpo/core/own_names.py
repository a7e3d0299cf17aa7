"""Names of shared memory and temporary folders, from which a later run can tell whether their owner is alive."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import zlib
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "msrpo"


def shared_memory_name(pid: int) -> str:
    """The first part of the names of an engine's shared memory blocks: host, process namespace and process id. A later
    run can tell from it whether their owner is alive, and two runs on one machine never use the same name."""
    return f"{PREFIX}.{_machine()}.{pid}"


def _machine() -> str:
    """Identifies this host and process namespace, outside of which a process id means nothing."""
    namespace = "0"
    with contextlib.suppress(OSError):
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    return f"{zlib.crc32(socket.gethostname().encode()):08x}-{namespace}"


def remove_leftovers(folder: Path = SHARED_MEMORY) -> list[str]:
    """Remove shared memory, or entries of another folder, that our dead processes left. Returns the names.

    It removes only entries that have our own name, belong to this user, were made in this process namespace, and whose
    process is gone. Other entries, also those with vLLM's own names, may be in use.
    """
    ours = re.compile(rf".?{PREFIX}\.{re.escape(_machine())}\.(\d+)-.*")
    removed = []
    for path in folder.iterdir() if folder.is_dir() else ():
        found = ours.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if found and path.stat().st_uid == os.getuid() and not Path(f"/proc/{found[1]}").exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path.name)
    return removed
