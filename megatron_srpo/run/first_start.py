"""The time of a run's first start. Chat templates that write today's date get it, so that a run that goes on on another
day has the same prompts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from megatron_srpo.core.atomic import atomic_write

FILE = "first_start"


def first_start(folder: Path, *, anew: bool, keep: bool) -> datetime:
    """The time of the first start of the run in `folder`, which is now if nothing is kept there, or with `anew`. With
    `keep` it is kept in a file of the folder, if the folder exists."""
    file = folder / FILE
    if not anew:
        try:
            return datetime.fromisoformat(file.read_text(encoding="utf-8").strip())
        except (OSError, ValueError):
            pass
    now = datetime.now().replace(microsecond=0)
    if keep and folder.is_dir():
        atomic_write(file, now.isoformat() + "\n", durable=True)
    return now
