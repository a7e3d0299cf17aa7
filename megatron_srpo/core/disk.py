"""Whether an error is the disk's, however deep a library has wrapped it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
FULL = os.strerror(errno.ENOSPC)
# What libraries that raise no OSError say: safetensors the system's words, torch.save its file position.
SAYINGS = re.compile(rf"{FULL}|inline_container\.cc:\d+\] \. unexpected pos")


def disk_problem(error: BaseException) -> str | None:
    """What the disk said ("runs/x: No space left on device") if it is the cause of `error`; else None.

    Looks into causes, and into the failures by rank that a checkpoint's writer collects.
    """
    for part in _parts(error, depth=8):
        if isinstance(part, OSError) and part.errno in ERRORS:
            return f"{part.filename or 'the disk'}: {part.strerror}"
        if SAYINGS.search(str(part)):
            return f"the disk: {FULL}"
    return None


def interrupt(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C that led to `error`, if one did."""
    return next((part for part in _parts(error, depth=8) if isinstance(part, KeyboardInterrupt)), None)


def _parts(error: BaseException, depth: int) -> Iterator[BaseException]:
    """`error`, what it collects, and its causes. Innermost collected ones first, because they are the precise ones."""
    if depth == 0:
        return
    failures = getattr(error, "failures", None)  # torch.distributed.checkpoint.api.CheckpointException: rank → failure
    for failure in failures.values() if isinstance(failures, dict) else ():
        inner = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(inner, BaseException):
            yield from _parts(inner, depth - 1)
    yield error
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield from _parts(cause, depth - 1)
