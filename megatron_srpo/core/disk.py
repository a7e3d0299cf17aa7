"""Finds out whether the disk caused an error, however deeply a library has wrapped it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
# What the disk answers when a folder that was there is gone, or its mount, or when this process may open no more files.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
FULL = os.strerror(errno.ENOSPC)
# Texts of libraries that raise no OSError: safetensors quotes the system, torch.save names a file position.
TEXTS = re.compile(rf"{FULL}|inline_container\.cc:\d+\] \. unexpected pos")


def disk_problem(error: BaseException, *, writing: bool = False) -> str | None:
    """The disk's message, e.g. "runs/x: No space left on device", if the disk is the cause of `error`; else None.

    It searches the chain of causes, and the failures by rank that the writer of a checkpoint collects. `writing` means
    that the error comes from writing files whose folder exists, so that a missing folder is the disk's problem too.
    """
    errors = ERRORS + GONE if writing else ERRORS
    parts = list(_parts(error, depth=8))
    for part in parts:
        if isinstance(part, OSError) and part.errno in errors:
            return f"{part.filename or 'the disk'}: {part.strerror}"
    if any(TEXTS.search(str(part)) for part in parts):  # a library has lost the number of the error
        return f"the disk: {FULL}"
    return None


def cure(problem: str) -> str:
    """What the user can do about a `disk_problem` of an output folder, as an imperative sentence without its stop."""
    if FULL in problem or os.strerror(errno.EDQUOT) in problem:
        return "Make room"
    return "Make the folder writable (its disk, mount and permissions)"


def interrupt(error: BaseException) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt that caused `error`, or None."""
    return next((part for part in _parts(error, depth=8) if isinstance(part, KeyboardInterrupt)), None)


def _parts(error: BaseException, depth: int) -> Iterator[BaseException]:
    """`error`, the errors that it collects, and its causes. Collected errors come first: they are more precise."""
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
