"""What both directions share: what they report, and that a folder appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from megatron_srpo.conversion.store_group import StoreGroup
from megatron_srpo.core.atomic import atomic_folder
from megatron_srpo.core.disk import disk_problem, interrupt
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import clause

Tell = Callable[[int, int], None]  # this process's bytes done, of how many
LAYER = "decoder.layers."


@dataclass
class Report:
    """A conversion in numbers; sizes in bytes, of Megatron's whole parameters."""

    tensors: int = 0
    what: str = "tensors"  # that `tensors` counts
    nbytes: int = 0
    largest: int = 0  # parameter
    layers: dict[str, int] = field(default_factory=dict)  # by number
    peak: int = 0  # host memory above the start, of the process that took most
    equal_to: str = ""  # the folder that the result was compared with, bit for bit
    lines: list[str] = field(default_factory=list)  # of a dry run

    def add(self, name: str, nbytes: int) -> None:
        """Count one parameter, by its Megatron name."""
        self.tensors += 1
        self.nbytes += nbytes
        self.largest = max(self.largest, nbytes)
        if name.startswith(LAYER):
            layer = name.removeprefix(LAYER).partition(".")[0]
            self.layers[layer] = self.layers.get(layer, 0) + nbytes

    @property
    def bound(self) -> int:
        """What the peak is held to: one layer and the largest tensor."""
        return max(self.layers.values(), default=0) + self.largest


def refuse_existing(out_dir: Path, *, dry_run: bool) -> None:
    """What is there is never replaced."""
    if not dry_run and os.path.lexists(out_dir):
        raise UserError(f"{out_dir} exists and is not replaced: remove it, or choose another folder with --out")


def _make_parent(out_dir: Path) -> None:
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out_dir}: the folder cannot be made ({error.strerror}); choose another") from error


@contextmanager
def written_aside(out_dir: Path, processes: StoreGroup) -> Iterator[Path]:
    """A folder to write into, which gets its name when all processes are through, and is removed on an error. What an
    interrupted conversion left is removed. UserError when the disk is full or may not be written."""
    aside = out_dir.with_name(f".{out_dir.name}.writing")  # the same on all processes, and for the next attempt
    try:
        if processes.is_leader:
            _make_parent(out_dir)
        with atomic_folder(out_dir, aside=aside, replace=False) if processes.is_leader else nullcontext():
            processes.gather(None)
            yield aside
            processes.gather(None)
        processes.gather(None)
    except BaseException as error:
        if (stop := interrupt(error)) is not None:
            raise stop from None  # a writer that is interrupted may raise an error of its own
        problem = disk_problem(error)
        if problem is None:
            raise
        raise UserError(
            f"{out_dir} could not be written: {clause(problem)}. Make room, or choose another --out"
        ) from error
