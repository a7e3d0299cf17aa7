"""The command `checkpoints`: lists a run's checkpoints, verifies them and removes old ones."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from megatron_srpo.checkpoints import folder as folders
from megatron_srpo.core.errors import UserError


def show(path: Path, *, verify: bool, prune: int, best: str) -> int:
    """Print a line for each checkpoint, oldest first. Returns 1 if one is damaged, else 0. UserError if there is none.

    `verify` reads every file; `prune` > 0 first removes all but that many of the newest; `best` names a metric.
    """
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folders.published(root):
        raise UserError(f"no checkpoint in {path}: expected a run, or a folder with step_NNNNNNNN in it")
    if best and folders.best(folders.published(root), best) is None:
        raise UserError(
            f"--best {best}: no checkpoint in {path} has that metric. They have {', '.join(_metrics(root)) or 'none'}"
        )
    if prune:
        for removed in folders.prune(root, prune, best):
            print(f"removed {removed.name}")
    found = folders.published(root)
    marks = {found[-1]: "latest"}
    chosen = folders.best(found, best) if best else None
    if chosen:
        marks[chosen] = ", ".join(filter(None, [marks.get(chosen), f"best {best}"]))
    bad = 0
    for checkpoint in found:
        problems = folders.damage(checkpoint) if verify else []
        bad += bool(problems)
        state = f"damaged: {problems[0]}" if problems else "whole" if verify else ""
        print("  ".join(filter(None, [_facts(checkpoint, best), marks.get(checkpoint), state])))
    if bad:
        print(f"{bad} of {len(found)} damaged; a resumed run skips them", file=sys.stderr)
    return int(bool(bad))


def _metrics(root: Path) -> list[str]:
    """The names of all metrics in the manifests."""
    names: set[str] = set()
    for checkpoint in folders.published(root):
        with suppress(OSError, ValueError, KeyError):
            names |= set(folders.read_manifest(checkpoint)["metrics"])
    return sorted(names)


def _facts(checkpoint: Path, metric: str) -> str:
    """Name, size, time, layout, and the metric if one is given."""
    try:
        manifest = folders.read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return f"{checkpoint.name}  (manifest unreadable: {error})"
    size = sum(file["bytes"] for file in manifest["files"].values())
    layout = " ".join(f"{name}{count}" for name, count in manifest["layout"].items() if count > 1) or "one rank"
    value = manifest["metrics"].get(metric.removeprefix("-"))
    shown = "" if value is None else f"  {metric.removeprefix('-')} {value:.4g}"
    return f"{checkpoint.name}  {size / 2**20:,.1f} MiB  {manifest['written']}  {layout}{shown}"
