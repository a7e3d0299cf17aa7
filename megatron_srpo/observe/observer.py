"""`Observer`: everything that is told about a run, on the driver alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_srpo.config import Config
from megatron_srpo.core.protocols import State
from megatron_srpo.core.records import Group
from megatron_srpo.observe.metrics import METRICS_FILE, JsonlWriter
from megatron_srpo.observe.progress import open_progress
from megatron_srpo.observe.rollouts import groups_record
from megatron_srpo.observe.trackers import Trackers

ROLLOUTS_FILE = "rollouts.jsonl"
WEIGHT = "rollout_corr/weight"  # mean importance weight of algorithm.rollout_correction over the trained tokens
LOW_WEIGHT = 0.9  # a correct correction keeps the mean close to 1
MISMATCH = "rollout_corr/logprob_diff_mean"  # mean |log π_trainer − log π_engine| of the sampled tokens, nats


class Observer:
    """Logs to metrics.jsonl, rollouts.jsonl, the trackers and the terminal. Nothing that goes wrong here stops
    training.

    `start_step`: iterations that an earlier process has finished; what was logged after them is dropped.
    """

    def __init__(self, config: Config, *, start_step: int = 0) -> None:
        self._mismatch_bound = config.rollout.mismatch_warning
        self._mismatch_warned = self._weight_warned = False
        self._progress = open_progress(
            config.observe.progress, name=config.run.name, total=config.run.iterations, start=start_step
        )
        try:
            folder = Path(config.run.output_dir)
            self._jsonl, self._rollouts = (
                JsonlWriter(folder / name, self.warn) for name in (METRICS_FILE, ROLLOUTS_FILE)
            )
            self._texts = config.observe.rollout_texts
            self._jsonl.resume(start_step)
            self._rollouts.resume(start_step)
            self._trackers = Trackers(config, start_step=start_step, say=self.message)
        except BaseException:
            self._progress.close()  # or the terminal stays without a cursor
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step: reduced values, by name."""
        self._jsonl.log(step, metrics)
        self._trackers.log(step, metrics)
        self._progress.update(step, metrics)
        self._watch_mismatch(step, metrics)
        self._watch_weight(step, metrics)

    def state_dict(self) -> State:
        """JSON-able: what later records are judged by."""
        return {"mismatch_warned": self._mismatch_warned, "weight_warned": self._weight_warned}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on as the run did that `state` was taken from."""
        self._mismatch_warned = bool(state.get("mismatch_warned", False))
        self._weight_warned = bool(state.get("weight_warned", False))

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Record what became of every response of one iteration."""
        self._rollouts.log(step, {"groups": groups_record(groups, self._texts)})

    def message(self, text: str) -> None:
        """A line for the user that does not disturb the display."""
        self._progress.message(text)

    def warn(self, text: str) -> None:
        self.message(f"warning: {text}")

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        self._jsonl.close()
        self._rollouts.close()
        self._trackers.close()
        self._progress.close()

    def _watch_mismatch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says it when trainer and engine begin to disagree, and when they agree again."""
        if not self._mismatch_bound or MISMATCH not in metrics:
            return
        mismatch = float(metrics[MISMATCH])
        wrong = not mismatch <= self._mismatch_bound  # NaN is wrong too
        if wrong and not self._mismatch_warned:
            self.warn(
                f"iteration {step}: trainer and rollout engine differ by {mismatch:.3g} nats a token on average "
                f"(rollout.mismatch_warning is {self._mismatch_bound:g}): weights, temperature or precision differ"
            )
        elif self._mismatch_warned and not wrong:
            self.message(f"iteration {step}: trainer and rollout engine agree again ({mismatch:.3g} nats a token)")
        self._mismatch_warned = wrong

    def _watch_weight(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says it when the rollout correction begins to take away a part of the loss, and when it no longer does."""
        if WEIGHT not in metrics:
            return
        weight = float(metrics[WEIGHT])
        low = not weight >= LOW_WEIGHT  # NaN is low too
        if low and not self._weight_warned:
            self.warn(
                f"iteration {step}: algorithm.rollout_correction leaves a mean weight of {weight:.3g}, so only this "
                "share of the loss remains: trainer and engine differ, responses are stale, or "
                "algorithm.rollout_correction_cap is too low"
            )
        elif self._weight_warned and not low:
            self.message(f"iteration {step}: the mean weight of the rollout correction is {weight:.3g} again")
        self._weight_warned = low


class SilentLog:
    """The log of the ranks other than 0: it tells nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def record(self, step: int, groups: Sequence[Group]) -> None: ...

    def message(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def state_dict(self) -> State:
        return {}

    def close(self) -> None: ...
