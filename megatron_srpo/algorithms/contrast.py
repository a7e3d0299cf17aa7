"""Dynamic sampling (DAPO, arXiv 2503.14476 §3.2): groups that teach nothing make room for others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_srpo.algorithms.base import Algorithm
from megatron_srpo.algorithms.routing import may_count
from megatron_srpo.algorithms.teachers import can_teach_all_wrong
from megatron_srpo.core.records import Group


class ContrastingGroups:
    """Groups of one iteration: all of one batch, or with `choose` up to `wanted` groups of any number of batches that
    have a contrast: right and wrong answers, or only wrong ones of which one can be distilled. If too few have one, the
    iteration is smaller; if none has, it is the last batch as it came.
    """

    def __init__(self, wanted: int, algorithm: Algorithm, *, choose: bool) -> None:
        self._wanted, self._algorithm, self._choose = wanted, algorithm, choose
        self.generated: list[Group] = []
        """All of them, in order."""
        self._kept: list[Group] = []
        self._rest: list[Group] = []  # the last batch, while nothing has a contrast
        self._counts: Counter[str] = Counter()

    def add(self, groups: Sequence[Group]) -> None:
        """One generated batch."""
        self._counts["generated"] += len(groups)
        self.generated += groups
        chosen = [group for group in groups if not self._choose or self._contrasts(group)]
        self._kept += chosen[: self._wanted - len(self._kept)]
        self._counts["dropped"] += len(groups) - len(chosen)
        self._rest = list(groups)

    def _contrasts(self, group: Group) -> bool:
        if not any(may_count(attempt.rollout, self._algorithm) for attempt in group.attempts):
            return False
        correct = [attempt.correct for attempt in group.attempts]
        if any(correct):
            return not all(correct)
        settings = self._algorithm.distillation  # other methods with a teacher learn from advantages, which are 0 here
        return settings is not None and settings.distils_all_wrong and can_teach_all_wrong(group, settings)

    @property
    def full(self) -> bool:
        return len(self._kept) >= self._wanted

    @property
    def groups(self) -> list[Group]:
        return self._kept or self._rest

    def metrics(self) -> dict[str, float]:
        """Groups generated, and groups dropped for want of a contrast; empty unless groups are chosen."""
        return {f"rollout/{name}_groups": count for name, count in self._counts.items()} if self._choose else {}
