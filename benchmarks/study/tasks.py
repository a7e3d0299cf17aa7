"""The three tasks of the study: their data, their warm start, and the keys of the configuration that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.study.tally import Tally
from examples.tiny.task import Task, make_rows, write_rows
from examples.tiny.warm_start import WarmStart, warm_started_model
from examples.worksheet.task import WARM_START, Worksheet

TRAIN_ROWS, TEST_ROWS = 4096, 300


@dataclass(frozen=True)
class StudyTask:
    """`keys` of the configuration in addition to those that `prepare` finds out. `grid`: the learning rates that every
    method tries; it is wide enough if no method's best is at an end of it."""

    name: str
    task: Task
    warm_start: WarmStart
    iterations: int
    kind: str = "exact"
    grid: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    keys: Mapping[str, object] = field(default_factory=dict)

    def rows(self, held_out: bool) -> list[dict[str, str]]:
        """Rows with the reference solution."""
        solve = getattr(self.task, "solution", self.task.answer)
        rows = make_rows(self.task, TEST_ROWS if held_out else TRAIN_ROWS, held_out=held_out, seed=0)
        return [{**row, "kind": self.kind, "solution": solve(row["prompt"])} for row in rows]

    def prepare(self, folder: Path) -> dict[str, object]:
        """The warm start and the data, made once in `folder`; returns the keys of every run of this task."""
        model = warm_started_model(self.task, self.warm_start, folder / "models")
        data = folder / "data" / self.name
        longest = len(self.task.plain(self.rows(True)[0]["prompt"]))
        return {
            "model.path": str(model),
            "data.train": str(write_rows(self.rows(False), data / "train.jsonl")),
            "data.test": str(write_rows(self.rows(True), data / "test.jsonl")),
            "data.max_prompt_length": longest,
            "rollout.max_response_length": self.task.max_new_tokens,
            "teacher.max_prompt_length": longest + self.task.max_new_tokens + 1,
            "run.iterations": self.iterations,
            **self.keys,
        }


TASKS = {
    task.name: task
    for task in (
        StudyTask("worksheet", Worksheet(), WARM_START, 200, grid=(1e-4, 2e-4, 5e-4, 1e-3)),
        StudyTask(
            "tally", Tally(), replace(WARM_START, steps=1200), 200, kind="tally", grid=(2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
        ),
        # An answer is right with a probability of about 0.375⁴, so most groups are all wrong at first.
        StudyTask("hard", Worksheet(least_error=0.4, most_error=0.85), WARM_START, 160, grid=(1e-4, 2e-4, 5e-4, 1e-3)),
    )
}
