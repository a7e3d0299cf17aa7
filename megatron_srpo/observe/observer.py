"""`Observer`: everything that is told about a run, on the driver alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_srpo.config import Config
from megatron_srpo.core.errors import nearest
from megatron_srpo.core.protocols import State
from megatron_srpo.core.records import Group
from megatron_srpo.observe.metrics import METRICS_FILE, JsonlWriter
from megatron_srpo.observe.progress import open_progress
from megatron_srpo.observe.rollouts import Decode, groups_record
from megatron_srpo.observe.trackers import Trackers
from megatron_srpo.observe.watches import watches

ROLLOUTS_FILE = "rollouts.jsonl"


class Observer:
    """Logs to metrics.jsonl, rollouts.jsonl, the trackers and the terminal. Nothing that goes wrong here stops
    training.

    `start_step`: iterations that an earlier process has finished; what was logged after them is dropped. `decode`: the
    text of the tokens of a teacher's prompt.
    """

    def __init__(self, config: Config, *, start_step: int = 0, decode: Decode = lambda ids: "") -> None:
        self._watches, self._decode, self._checkpoint = watches(config), decode, config.checkpoint
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
        self._look_for_best(step, metrics)
        for watch in self._watches:
            told = watch.look(metrics)
            if told is not None:
                text, is_warning = told
                (self.warn if is_warning else self.message)(f"iteration {step}: {text}")

    def _look_for_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn at the first checkpoint if nothing measures what the best one is chosen by."""
        name = self._checkpoint.keep_best.removeprefix("-")
        if not name or not self._checkpoint.every or step % self._checkpoint.every:
            return
        if name.startswith("eval/") and not any(found.startswith("eval/") for found in metrics):
            return  # this evaluation was stopped
        if name not in metrics:
            self.warn(
                f'checkpoint.keep_best = "{self._checkpoint.keep_best}": this run measures no such metric.'
                f"{nearest(name, metrics)} The best checkpoint is removed when it is not among the newest "
                f"{self._checkpoint.keep} any more"
            )
        self._checkpoint = self._checkpoint.model_copy(update={"keep_best": ""})  # it is told once

    def state_dict(self) -> State:
        """JSON-able: what later records are judged by."""
        return {watch.name: watch.warned for watch in self._watches}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on as the run did that `state` was taken from."""
        for watch in self._watches:
            watch.warned = bool(state.get(watch.name, False))

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Record what became of every response of one iteration."""
        self._rollouts.log(step, {"groups": groups_record(groups, self._texts, self._decode)})

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


class SilentLog:
    """The log of the ranks other than 0: it tells nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def record(self, step: int, groups: Sequence[Group]) -> None: ...

    def message(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def state_dict(self) -> State:
        return {}

    def close(self) -> None: ...
