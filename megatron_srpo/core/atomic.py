"""Files and folders that appear complete or not at all.

Everything is written under another name in the same folder, and renamed when it is complete. A process that is killed
leaves that other name behind, and the old file or folder untouched. `durable` also survives a power failure: the bytes
are on the disk before the rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    block raises. Missing parents are made.

    `aside` is the name to write under; the default contains the process id. `replace=False` raises OSError if a file
    or a folder that is not empty has the name `target` by then.
    """
    aside = aside or target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if replace:
            replace_folder(aside, target)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, target: Path) -> None:
    """Rename a complete folder to `target`. An old folder of that name is moved out of the way first, and removed only
    when the new one has the name: a rename cannot replace a folder that is not empty."""
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(replaced)
    aside.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free name of `stem.previous.1.suffix`, `.2`, …; returns the new name."""
    number = 1
    while (previous := path.with_name(f"{path.stem}.previous.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(previous)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
