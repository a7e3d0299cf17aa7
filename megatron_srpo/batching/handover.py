"""When distillation hands over to reinforcement: the gap between teacher and student has stopped falling.

The gap of an iteration is `srpo/distill_loss`, the mean divergence of the distilled tokens. With N =
algorithm.distill_patience, the run hands over when the mean gap of the newest N values has not reached a new lowest
value for N iterations that distilled something. Every rank decides the same from the same metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_srpo.config import Config
from megatron_srpo.core.protocols import State

GAP = "srpo/distill_loss"


class Handover:
    """Watches the gap, and remembers the iteration from which the algorithm's distillation weight falls."""

    def __init__(self, config: Config, state: State) -> None:
        self._patience = int(getattr(config.algorithm, "distill_patience", 0))
        self._recent = [float(str(value)) for value in _listed(state.get("recent"))]
        self._lowest = float(str(state.get("lowest", math.inf)))
        self._waited = int(str(state.get("waited", 0)))
        since = state.get("since")
        self.since = None if since is None else int(str(since))
        """The first iteration, counted from 0, after distillation has done its work. None: it still goes on."""

    def watch(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Look at the metrics of the iteration number `iteration`, counted from 0. Returns whether distillation has
        handed over, as a metric; without algorithm.distill_patience it is empty. A gap that is missing or not finite is
        left out."""
        gap = float(metrics.get(GAP, math.nan))
        if not self._patience:
            return {}
        if self.since is None and math.isfinite(gap):
            self._add(iteration, gap)
        return {"srpo/handed_over": float(self.since is not None)}

    def _add(self, iteration: int, gap: float) -> None:
        self._recent = [*self._recent, gap][-self._patience :]
        if len(self._recent) < self._patience:
            return
        mean = math.fsum(self._recent) / self._patience
        self._waited = 0 if mean < self._lowest else self._waited + 1
        self._lowest = min(self._lowest, mean)
        if self._waited >= self._patience:  # more, if a resumed run has less patience
            self.since = iteration + 1

    def state_dict(self) -> State:
        """Where a resumed run goes on."""
        if not self._patience and self.since is None:
            return {}
        lowest = {} if math.isinf(self._lowest) else {"lowest": self._lowest}
        return {"recent": self._recent, "waited": self._waited, "since": self.since, **lowest}


def _listed(saved: object) -> list[object]:
    return saved if isinstance(saved, list) else []
