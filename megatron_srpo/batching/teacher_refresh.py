"""When a "refresh" teacher takes the student's weights: every N iterations, or only when the student has improved.

The gate follows CGTR (arXiv 2606.03532): the teacher takes only a student with a higher reward than all that it took
before, whose responses are not collapsing. Every rank decides the same from the same metrics.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_srpo.config import Config
from megatron_srpo.core.protocols import State

REWARD, LENGTH, TRUNCATED = "critic/score/mean", "response_length/mean", "response_length/clip_ratio"
MORE_TRUNCATED = 0.1  # share of responses that may be cut in addition to the fewest at a refresh


class TeacherRefresh:
    """Counts iterations since the last refresh, and remembers the best metrics of the students that were copied, the
    initial policy among them: a bar that followed the last one could sink step by step."""

    def __init__(self, config: Config, state: State) -> None:
        self._teacher = config.teacher
        self._on = config.teacher.mode == "refresh" and config.algorithm.needs.teacher
        self._age = int(str(state.get("age", 0)))
        self._copied = {name: float(str(state[name])) for name in (REWARD, LENGTH, TRUNCATED) if name in state}

    def due(self, metrics: Mapping[str, float]) -> bool:
        """Whether the teacher takes the student's weights after an iteration with these `metrics`."""
        if not self._on:
            return False
        found = {name: metrics[name] for name in (REWARD, LENGTH, TRUNCATED)}
        self._copied = self._copied or found
        self._age += 1
        if self._age % self._teacher.refresh_every or not self._passes(found):
            return False
        best = {REWARD: max, LENGTH: max, TRUNCATED: min}
        self._age, self._copied = 0, {name: best[name](found[name], self._copied[name]) for name in found}
        return True

    def _passes(self, found: Mapping[str, float]) -> bool:
        return self._teacher.refresh_when == "always" or (
            found[REWARD] > self._copied[REWARD]
            and found[LENGTH] >= self._teacher.refresh_min_length * self._copied[LENGTH]
            and found[TRUNCATED] <= self._copied[TRUNCATED] + MORE_TRUNCATED
        )

    def metrics(self) -> dict[str, float]:
        """Iterations since the last refresh, and whether this iteration ended with one."""
        return {"teacher/age": self._age, "teacher/refreshed": float(self._age == 0)} if self._on else {}

    def state_dict(self) -> State:
        """Where a resumed run goes on."""
        return {"age": self._age, **self._copied}
