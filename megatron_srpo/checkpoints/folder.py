"""A checkpoint's folder and its manifest.

A folder is written under another name and renamed when it is complete; its manifest, written last, names every file
with its size and SHA-256. Times are wall-clock and for people only: the order of checkpoints is that of iterations.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_srpo.core.atomic import atomic_write, replace_folder, sync
from megatron_srpo.core.errors import UserError

MANIFEST = "manifest.json"
CONFIG, STATE = "config.json", "run.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8})")


def folder_name(iteration: int) -> str:
    return f"step_{iteration:08d}"


def iteration_of(folder: Path) -> int:
    """The iteration after which `folder`, a checkpoint's, was written."""
    return int(_NAME.fullmatch(folder.name)[1])


def published(root: Path) -> list[Path]:
    """The checkpoints below `root`, oldest first: a folder has such a name only when it is finished. Whether they are
    still whole, `damage` says."""
    return sorted(path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())


def find_latest(root: Path) -> Path | None:
    """The newest finished checkpoint below `root`, or None."""
    return next(reversed(published(root)), None)


def resolve(path: Path) -> Path:
    """A checkpoint from a user's path: itself, a folder of checkpoints, or a run. Raises UserError."""
    for candidate in (path, find_latest(path), find_latest(path / "checkpoints")):
        if candidate is not None and _NAME.fullmatch(candidate.name) and candidate.is_dir():
            return candidate
    raise UserError(f"no checkpoint in {path}: expected one (a folder step_NNNNNNNN), or a run's output folder")


def whole(path: Path) -> Path:
    """`resolve`, and UserError if the checkpoint is damaged."""
    found = resolve(path)
    problems = damage(found)
    if problems:
        raise UserError(f"checkpoint {found} is damaged ({problems[0]}): choose another one")
    return found


# ---- manifest --------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hex digest} of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest: `facts` (plain data) and the `checksum` of every file, by name. It vouches for itself too."""
    manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items()))}
    manifest["self"] = _digest_of(manifest)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError if it is damaged or of another format."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("self") != _digest_of(manifest):
        raise ValueError("its own checksum differs")
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, in words; [] if every byte is as it was written. `part` of `parts` equal shares
    of the files is looked at, so that ranks can divide the work."""
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


# ---- a run's set -----------------------------------------------------------------------------------------------------


def best(folders: Iterable[Path], metric: str) -> Path | None:
    """The checkpoint with the greatest `metric` ("-name": the least), the newest of equals; None where none has it."""
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
    """Remove all but the newest `keep` checkpoints and, if it is asked for, the best one; returns what was removed."""
    found = published(root)
    spared = best(found, keep_best) if keep_best else None
    removed = [folder for folder in found[:-keep] if folder != spared]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def publish(aside: Path, target: Path) -> None:
    """Give a complete folder its name, and point `latest` to it."""
    sync(aside)
    replace_folder(aside, target)
    atomic_write(target.parent / "latest", target.name + "\n", durable=True)
    sync(target.parent)


def remove_unfinished(root: Path) -> None:
    """Remove what killed runs left. Only for the run that owns the folder."""
    for pattern in ("writing_*", ".step_*.replaced-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
