"""Checkpoint folders of a run: complete or absent, the newest few kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_srpo.config import Config, UserError
from megatron_srpo.disk import disk_problem

_NAME = re.compile(r"step_(\d{8})")


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None. A folder gets its name only when it is complete."""
    complete = [path for path in root.glob("step_*") if _NAME.fullmatch(path.name)]
    return max(complete, default=None, key=lambda path: path.name)


def resolve(path: Path) -> Path:
    """A checkpoint from a user's path: itself, a folder of checkpoints, or a run. Raises UserError."""
    for candidate in (path, find_latest(path), find_latest(path / "checkpoints")):
        if candidate is not None and _NAME.fullmatch(candidate.name) and candidate.is_dir():
            return candidate
    raise UserError(f"no checkpoint in {path}: expected a folder step_NNNNNNNN, or a run that holds checkpoints/step_*")


class Checkpoints:
    """Saves and restores a run. `write` and `read` are mcore.checkpoint's functions; all ranks call the methods."""

    def __init__(self, config: Config, control: Any, write: Callable, read: Callable) -> None:
        self._config, self._control = config, control
        self._write, self._read = write, read
        self.root = Path(config.run.output_dir) / "checkpoints"
        self.last: Path | None = None

    def save(self, policy: Any, iteration: int, extra: dict[str, Any]) -> None:
        """Write aside, then rename; then drop the oldest ones beyond checkpoint.keep."""
        target = self.root / f"step_{iteration:08d}"
        aside = self.root / f"writing_{iteration:08d}"
        self._control.share(lambda: shutil.rmtree(aside, ignore_errors=True))
        try:
            self._write(policy, aside, {"iteration": iteration, **extra})
        except (Exception, CheckpointException) as error:
            told = self._not_written(target, error)
            if told is None:
                raise
            raise told from error
        self._control.share(lambda: self._publish(aside, target))
        self.last = target

    def _not_written(self, target: Path, error: BaseException) -> Exception | None:
        """What to raise in place of `error`, if anything. A CheckpointException is no Exception; all ranks raise it,
        and the driver's alone says why."""
        problem = disk_problem(error)
        if problem is None and isinstance(error, CheckpointException):
            if error.failures:
                return RuntimeError(f"checkpoint {target} could not be written: {error}")
            problem = "the driver knows why"
        if problem is None:
            return None
        return UserError(
            f"checkpoint {target} could not be written: {problem}. Make room and start the same command again: it goes "
            f"on from {self.last or 'the beginning'}."
        )

    def _publish(self, aside: Path, target: Path) -> None:
        (aside / "config.json").write_text(self._config.model_dump_json(indent=1))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        (self.root / "latest").write_text(target.name + "\n")
        old = sorted(path for path in self.root.glob("step_*") if _NAME.fullmatch(path.name))
        for path in old[: -self._config.checkpoint.keep]:
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, policy: Any) -> dict[str, Any] | None:
        """Load the newest checkpoint of this run into `policy`; returns what was saved beside it, or None."""
        if not self._config.checkpoint.resume:
            self._control.share(self._set_aside)
            return None
        found = self._control.share(lambda: find_latest(self.root))
        if found is None:
            return None
        self._control.share(lambda: self._refuse_other_model(found))
        self.last = found
        return self._read(policy, found)

    def _set_aside(self) -> None:
        """A run that starts anew keeps an earlier one's checkpoints under another name: among its own, the later ones
        of them would count as the newest."""
        if find_latest(self.root) is None:
            return
        number = 1
        while (aside := self.root.with_name(f"checkpoints.previous.{number}")).exists():
            number += 1
        self.root.rename(aside)

    def _refuse_other_model(self, found: Path) -> None:
        before, now = json.loads((found / "config.json").read_text()), self._config.model_dump()
        differ = [
            f"its {section}.{key} is {before[section][key]}, this run's is {now[section][key]}"
            for section, key in (("model", "path"), ("algorithm", "name"))
            if before[section][key] != now[section][key]
        ]
        if differ:
            raise UserError(
                f"{found} is of another run: {'; '.join(differ)}. Choose another run.output_dir, or start anew: "
                "checkpoint.resume = false"
            )
