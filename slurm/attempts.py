"""How often a run was started in vain: what stops a job that would crash and be requeued for ever.

An attempt that leaves no newer checkpoint than it found is fruitless. It is counted when it begins, and no longer once
there is a newer one: so an attempt that ends without a word, because its node or the batch host died, is counted too.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_srpo.core.atomic import atomic_write

NAME = "slurm_attempts.json"


def newest_checkpoint(output: Path) -> str:
    """The name of a run's newest complete checkpoint, "" where there is none."""
    return max((path.name for path in (output / "checkpoints").glob("step_*")), default="")


class Attempts:
    """The count in a run's output folder, kept over the requeues of one job; a new submission starts at 0."""

    def __init__(self, output: Path, limit: int, job_id: str) -> None:
        self._output, self._file, self._limit, self._job = output, output / NAME, limit, job_id

    @property
    def fruitless(self) -> int:
        """Attempts in a row without a newer checkpoint, the one that runs included."""
        try:
            seen = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return 0
        same = seen["job"] == self._job and seen["checkpoint"] == newest_checkpoint(self._output)
        return seen["fruitless"] if same else 0

    @property
    def exhausted(self) -> bool:
        return self.fruitless >= self._limit

    def begin(self) -> None:
        newest, fruitless = newest_checkpoint(self._output), self.fruitless + 1
        state = {"job": self._job, "checkpoint": newest, "fruitless": fruitless}
        self._output.mkdir(parents=True, exist_ok=True)
        atomic_write(self._file, json.dumps(state) + "\n")

    def forget(self) -> None:
        """The count ends here: the run is done."""
        self._file.unlink(missing_ok=True)
