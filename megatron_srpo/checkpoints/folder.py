"""A checkpoint's folder and its manifest.

A folder is written under another name and renamed when it is complete. The manifest is written last and names every
file with its size and SHA-256. Its time is for people only: checkpoints are ordered by iteration.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar, cast

from megatron_srpo.core.atomic import atomic_write, remove_leftovers, replace_folder, sync, sync_tree
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.json_types import open_without_waiting, read_json, require_regular

MANIFEST = "manifest.json"
CONFIG, STATE = "config.json", "run.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8})")
# With these errors the file is absent or of another kind. All other errors say nothing about its bytes.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
# A read that fails is repeated after these seconds: a network file system, or a busy process, recovers.
RETRY_AFTER_SECONDS = (1.0, 5.0)

T = TypeVar("T")


class Unreadable(UserError):
    """A checkpoint cannot be read at the moment, so that nobody knows whether it is damaged."""


class OtherFormat(UserError):
    """An undamaged manifest that another version of this program has written."""


class FileFacts(TypedDict):
    """Size and checksum of one file."""

    bytes: int
    sha256: str  # hex digest


class Facts(TypedDict):
    """What a manifest says about the run at the time of the checkpoint."""

    iteration: int
    written: str  # ISO 8601, UTC
    metrics: dict[str, float]  # of that iteration
    layout: dict[str, int]  # sizes of the parallel dimensions, e.g. {"tp": 2, "pp": 1, …}
    versions: dict[str, str]  # of Python and the libraries
    architecture: str  # changes.architecture


class Manifest(Facts):
    """The content of manifest.json."""

    format: int
    files: dict[str, FileFacts]
    self: str  # SHA-256 of all the rest


def folder_name(iteration: int) -> str:
    return f"step_{iteration:08d}"


def iteration_of(folder: Path) -> int:
    """The iteration after which the checkpoint `folder` was written."""
    name = _NAME.fullmatch(folder.name)
    assert name is not None, f"{folder} is no checkpoint"
    return int(name[1])


def published(root: Path) -> list[Path]:
    """The complete checkpoints below `root`, oldest first. Whether they are undamaged, `damage` says."""
    try:  # not glob(), which finds nothing in a folder that cannot be read: the run would start from the beginning
        names = _read_patiently(root, partial(os.listdir, root))
    except OSError:
        return []
    return sorted(path for path in map(root.joinpath, names) if _NAME.fullmatch(path.name) and path.is_dir())


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None."""
    return next(reversed(published(root)), None)


def resolve(path: Path) -> Path:
    """The checkpoint that a user's path means: a checkpoint itself, or the newest one of a run or of its checkpoints
    folder. UserError if there is none."""
    for candidate in (path, find_latest(path), find_latest(path / "checkpoints")):
        if candidate is not None and _NAME.fullmatch(candidate.name) and candidate.is_dir():
            return candidate
    raise UserError(f"no checkpoint in {path}: expected one (a folder step_NNNNNNNN), or a run's output folder")


def whole(path: Path) -> Path:
    """As `resolve`; UserError if the checkpoint is damaged."""
    found = resolve(path)
    problems = damage(found)
    if problems:
        raise UserError(f"checkpoint {found} is damaged ({problems[0]}): choose another one")
    return found


# ---- manifest --------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> FileFacts:
    """Size and SHA-256 of a file. ValueError if it is a pipe or a device."""
    with open(path, "rb", opener=open_without_waiting) as file:
        require_regular(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(folder: Path, facts: Facts, files: dict[str, FileFacts]) -> None:
    """Write the manifest: `facts`, the `checksum` of every file by name, and a checksum of the manifest itself."""
    manifest: Manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items())), "self": ""}
    manifest["self"] = _digest_of(manifest)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest. ValueError if it is damaged, OtherFormat if another version of this program has written it."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("self") != _digest_of(manifest):
        raise ValueError("its own checksum differs")
    if manifest.get("format") != FORMAT:
        raise OtherFormat(
            f"checkpoint {folder} has format {manifest.get('format')}, this version of the program reads {FORMAT}: use "
            "the version that wrote it, or another run.output_dir"
        )
    if not manifest.keys() >= Manifest.__required_keys__ or not _are_file_facts(manifest["files"]):
        raise ValueError("it does not list files with their sizes and checksums")
    tables = (manifest["metrics"], manifest["layout"], manifest["versions"])
    if type(manifest["iteration"]) is not int or not all(isinstance(table, dict) for table in tables):
        raise ValueError("it does not describe its run")
    return cast(Manifest, manifest)


def _are_file_facts(files: object) -> bool:
    return isinstance(files, dict) and all(
        name == Path(name).name and isinstance(facts, dict) and facts.keys() >= FileFacts.__required_keys__
        for name, facts in files.items()
    )


def _read_patiently(folder: Path, read: Callable[[], T]) -> T:
    """The result of `read`, which is repeated after an error. OSError if a file is absent; Unreadable if the last
    attempt fails too."""
    for seconds in (*RETRY_AFTER_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if error.errno in ABSENT:
                raise
            if seconds is None:
                name = Path(error.filename).name if error.filename else "a file"
                raise Unreadable(
                    f"checkpoint {folder} cannot be read ({name}: {error.strerror or error}), so nobody knows whether "
                    "it is damaged. Nothing was changed. Make it readable (permissions, mount, limit of open files), "
                    "then start the same command again. If its disk has lost it, rename the folder, and the "
                    "checkpoint before it is used"
                ) from error
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def _digest_of(manifest: Mapping[str, object]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """The problems of a checkpoint, in words; [] if every byte is as it was written. Only share number `part` of
    `parts` equal shares of the files is read, so that ranks can divide the work.

    Raises Unreadable if a file is there but cannot be read, and OtherFormat: neither says that the file is damaged.
    """
    try:
        files = _read_patiently(folder, partial(read_manifest, folder))["files"]
    except (Unreadable, OtherFormat):
        raise
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are ValueErrors
        return [f"{MANIFEST}: {error}"]
    problems = []
    for name, expected in sorted(files.items())[part::parts]:
        try:
            found = _read_patiently(folder, partial(checksum, folder / name))
        except Unreadable:
            raise
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error.strerror if isinstance(error, OSError) else error}")
            continue
        if found["bytes"] != expected["bytes"]:
            problems.append(f"{name}: {found['bytes']} bytes, {expected['bytes']} were written")
        elif found["sha256"] != expected["sha256"]:
            problems.append(f"{name}: its checksum differs")
    return problems


def has_all_files(folder: Path) -> bool:
    """Whether the manifest is undamaged and every file is there in its size. It reads no file, so that a run can ask
    often. False also if the folder cannot be read at the moment."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError):
        return False


def _can_be_read(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except OSError as error:
        return error.errno in ABSENT
    except ValueError:
        pass
    return True


# ---- all checkpoints of a run ----------------------------------------------------------------------------------------


def best(folders: Iterable[Path], metric: str) -> Path | None:
    """The checkpoint with the greatest `metric` ("-name": the least), and the newest of equal ones; None if none has
    the metric."""
    name, sign = metric.removeprefix("-"), -1.0 if metric.startswith("-") else 1.0
    scored = []
    for folder in folders:
        try:
            value = read_manifest(folder)["metrics"].get(name)
        except (OSError, ValueError):
            continue
        if value is not None:
            scored.append((sign * value, folder.name, folder))
    return max(scored)[2] if scored else None


def prune(root: Path, keep: int, keep_best: str = "", *, whole: Collection[Path] | None = None) -> list[Path]:
    """Remove all checkpoints that are older than the newest `keep` whole ones, except the best one by the metric
    `keep_best`, if that is given. Returns the folders that were removed.

    A damaged checkpoint does not count, so the last whole one always stays. `whole` are the checkpoints that are known
    to be whole; by default those that have all their files.
    """
    found = published(root)
    whole = [folder for folder in found if (has_all_files(folder) if whole is None else folder in whole)]
    if len(whole) <= keep:
        return []
    oldest_kept, spared = whole[-keep], best(whole, keep_best) if keep_best else None
    # A checkpoint that cannot be read at the moment may be the best one.
    removed = [folder for folder in found if folder < oldest_kept and folder != spared and _can_be_read(folder)]
    for folder in removed:
        aside = folder.with_name(f"removing_{folder.name}")  # a removal that is killed leaves no half of a checkpoint
        with suppress(OSError):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    return [folder for folder in removed if not folder.exists()]


def publish(aside: Path, target: Path) -> None:
    """Rename a complete folder to `target`, and name it in the file `latest`."""
    sync_tree(aside)
    replace_folder(aside, target)
    atomic_write(target.parent / "latest", target.name + "\n", durable=True)
    sync(target.parent)


def remove_unfinished(root: Path) -> None:
    """Remove the incomplete folders of killed runs. Only the run that owns `root` may call it."""
    for pattern in ("writing_*", "removing_*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(root)
