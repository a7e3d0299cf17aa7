"""Files and folders that appear complete or not at all.

Everything is written under another name in the same folder, and renamed when it is complete. A process that is killed
leaves that other name behind, and the old file or folder untouched; `remove_leftovers` removes such names. `durable`
also survives a power failure: the bytes are on the disk before the rename.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # what a file system answers that does not know an operation
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>writing|replaced)-\d+(\.\w+)?")


def atomic_write(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file as UTF-8. OSError if the disk does not take it; the old file then stays."""
    with atomic_file(path, durable=durable) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a path to write to, with the suffix of `path`; it takes the place of `path` when the block ends, and is
    removed when the block raises. The process id in its name lets two processes write the same file."""
    aside = path.with_name(f".{path.stem}.writing-{os.getpid()}{path.suffix}")
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, aside: Path | None = None, replace: bool = True) -> Iterator[Path]:
    """Yields an empty folder to write into; it takes the name `target` when the block ends, and is removed when the
    block raises. Missing parents are made. All its bytes are on the disk before it gets the name.

    `aside` is the name to write under; the default contains the process id. `replace=False` raises OSError if a file
    or a folder that is not empty has the name `target` by then. A symbolic link `target` stays, and the folder that it
    leads to is replaced.
    """
    target = Path(os.path.realpath(target))
    aside = aside or target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_tree(aside)
        if replace:
            replace_folder(aside, target)
        else:
            aside.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, target: Path) -> None:
    """Rename a complete folder to `target`. If an old folder has that name, the two exchange their names in one step,
    and the old one is removed.

    Some file systems (NFS) cannot exchange. There the old folder is moved out of the way first, and
    `remove_leftovers` moves it back if the process is killed in between.
    """
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if not target.exists():
        aside.rename(target)
    elif _exchange(aside, target):
        aside.rename(replaced)
    else:
        target.rename(replaced)
        aside.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Have two paths exchange their names (Linux). False if the system or the file system cannot do it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in `folder` under the names of this module. A folder that was moved out of
    the way gets its name back if nothing has it. Only the owner of `folder`, who holds its lock, may call it."""
    found: list[Path] = []
    with suppress(OSError):
        found = sorted(folder.iterdir())
    for path in found:
        name = LEFTOVER.fullmatch(path.name)
        if name is None:
            continue
        with suppress(OSError):
            if name["kind"] == "replaced" and not os.path.lexists(folder / name["name"]):
                path.rename(folder / name["name"])
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free name of `stem.previous.1.suffix`, `.2`, …; returns the new name."""
    number = 1
    while (previous := path.with_name(f"{path.stem}.previous.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(previous)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and everything in it."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk. Some file systems (of object stores) cannot do
    it for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNABLE or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
