"""The command `checkpoints`: lists a run's checkpoints, verifies them and removes old ones."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from megatron_srpo.checkpoints import folder as folders
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import visible

WHOLE, DAMAGED = "whole", "damaged"


def show(path: Path, *, verify: bool, prune: int, best: str) -> int:
    """Print a line for each checkpoint, oldest first. Returns 1 if one is damaged, else 0. UserError if there is none.

    `verify` reads every file. `prune` > 0 reads every file too, and then removes what is older than the newest `prune`
    whole checkpoints. `best` names a metric; the best whole checkpoint stays.
    """
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = folders.published(root)
    if not found:
        raise UserError(f"no checkpoint in {path}: expected a run, or a folder with step_NNNNNNNN in it")
    if best and folders.best(found, best) is None:
        raise UserError(
            f"--best {best}: no checkpoint in {path} has that metric. They have {', '.join(_metrics(root)) or 'none'}"
        )
    if prune:
        states = {checkpoint: _state(checkpoint, raises=True) for checkpoint in found}  # before anything is removed
        removed = folders.prune(root, prune, best, whole=[name for name, state in states.items() if state == WHOLE])
        for checkpoint in removed:
            print(f"removed {checkpoint.name}")
            found.remove(checkpoint)
    else:
        states = {checkpoint: _state(checkpoint) if verify else "" for checkpoint in found}
    marks = {found[-1]: "latest"}
    chosen = folders.best([name for name in found if states[name] in (WHOLE, "")], best) if best else None
    if chosen:
        marks[chosen] = ", ".join(filter(None, [marks.get(chosen), f"best {best}"]))
    for checkpoint in found:
        print(visible("  ".join(filter(None, [_facts(checkpoint, best), marks.get(checkpoint), states[checkpoint]]))))
    damaged = sum(states[checkpoint].startswith(DAMAGED) for checkpoint in found)
    if damaged:
        print(f"{damaged} of {len(found)} damaged; a resumed run skips them", file=sys.stderr)
    return int(any(states[checkpoint] not in (WHOLE, "") for checkpoint in found))


def _state(checkpoint: Path, *, raises: bool = False) -> str:
    """What verifying a checkpoint shows: WHOLE, or a problem in words. `raises` lets the UserError of a checkpoint that
    cannot be read through."""
    try:
        problems = folders.damage(checkpoint)
    except UserError as error:
        if raises:
            raise
        return f"unknown: {error}"
    return f"{DAMAGED}: {problems[0]}" if problems else WHOLE


def _metrics(root: Path) -> list[str]:
    """The names of all metrics in the manifests."""
    names: set[str] = set()
    for checkpoint in folders.published(root):
        with suppress(OSError, ValueError):
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
