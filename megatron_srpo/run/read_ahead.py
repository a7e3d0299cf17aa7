"""Reads the model's weights into the page cache while Python imports its libraries, which keeps no disk busy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

THREADS, BLOCK = 4, 8 * 2**20  # network file systems need several readers; bytes of one read
SHARE = 0.5  # of the memory that is available: the weights must still be in the cache when the engine reads them


def read_ahead(model: str) -> list[Thread]:
    """Begin to read the safetensors files in the folder `model`, once per node. Returns the threads, none if the files
    are too large for the page cache. A file that cannot be read is left to the code that needs it."""
    import psutil

    files = sorted(Path(model).expanduser().glob("*.safetensors"))
    with suppress(OSError):
        fits = sum(file.stat().st_size for file in files) <= SHARE * psutil.virtual_memory().available
        if fits and os.environ.get("LOCAL_RANK", "0") == "0":
            shared = iter(files)
            threads = [Thread(target=_read, args=[shared], name="read ahead", daemon=True) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            return threads
    return []


def _read(files: Iterator[Path]) -> None:
    """Read those files that no other thread has begun."""
    buffer = bytearray(BLOCK)
    for file in files:
        with suppress(OSError), file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
