"""A checkpoint's folder and its manifest.

A folder is written under another name and renamed when it is complete. The manifest is written last and names every
file with its size and SHA-256. Its time is for people only: checkpoints are ordered by iteration.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

from megatron_srpo.core.atomic import atomic_write, replace_folder, sync
from megatron_srpo.core.errors import UserError

MANIFEST = "manifest.json"
CONFIG, STATE = "config.json", "run.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8})")


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
    return sorted(path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())


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
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(folder: Path, facts: Facts, files: dict[str, FileFacts]) -> None:
    """Write the manifest: `facts`, the `checksum` of every file by name, and a checksum of the manifest itself."""
    manifest: Manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items())), "self": ""}
    manifest["self"] = _digest_of(manifest)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest. ValueError if it is damaged or has another format."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("self") != _digest_of(manifest):
        raise ValueError("its own checksum differs")
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']}, this version reads {FORMAT}")
    return cast(Manifest, manifest)


def _digest_of(manifest: Mapping[str, object]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """The problems of a checkpoint, in words; [] if every byte is as it was written. Only share number `part` of
    `parts` equal shares of the files is read, so that ranks can divide the work."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are ValueErrors
        return [f"{MANIFEST}: {error}"]
    problems = []
    for name, expected in sorted(files.items())[part::parts]:
        try:
            found = checksum(folder / name)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if found["bytes"] != expected["bytes"]:
            problems.append(f"{name}: {found['bytes']} bytes, {expected['bytes']} were written")
        elif found["sha256"] != expected["sha256"]:
            problems.append(f"{name}: its checksum differs")
    return problems


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


def prune(root: Path, keep: int, keep_best: str = "") -> list[Path]:
    """Remove all but the newest `keep` checkpoints and the best one by the metric `keep_best`, if that is given.
    Returns the folders that were removed."""
    found = published(root)
    spared = best(found, keep_best) if keep_best else None
    removed = [folder for folder in found[:-keep] if folder != spared]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def publish(aside: Path, target: Path) -> None:
    """Rename a complete folder to `target`, and name it in the file `latest`."""
    sync(aside)
    replace_folder(aside, target)
    atomic_write(target.parent / "latest", target.name + "\n", durable=True)
    sync(target.parent)


def remove_unfinished(root: Path) -> None:
    """Remove the incomplete folders of killed runs. Only the run that owns `root` may call it."""
    for pattern in ("writing_*", ".step_*.replaced-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
