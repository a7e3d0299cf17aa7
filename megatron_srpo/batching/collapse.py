"""The alarm for collapsing responses: short correct answers teach the model to answer shorter still.

Each watched metric is compared with its own history: the mean of the newest WINDOW iterations against the highest such
mean before. Responses collapse

- if their length has fallen below `train.collapse_share` of that,
- or below EARLY_LENGTH, while an entropy has fallen below LOW_ENTROPY or the reward below LOW_REWARD,
- or if they no longer end: the share that is not cut has fallen below EARLY_ENDED, and the reward below LOW_REWARD.

Entropies alone are no alarm, because they fall in every run that learns. Neither is the reward alone, which is noisy.
Correct responses must have become shorter too. A model that learns to end its answers makes its responses shorter, and
that is no collapse. Every rank decides the same from the same metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_srpo.config import Config
from megatron_srpo.core.protocols import Log, State

WINDOW = 10  # iterations
EARLY_LENGTH, EARLY_ENDED, LOW_ENTROPY, LOW_REWARD = 0.75, 0.8, 0.25, 0.75
LENGTH, CORRECT_LENGTH = "response_length/mean", "srpo/response_length_correct"
REWARD, TRUNCATED = "critic/score/mean", "response_length/clip_ratio"
TEACHER_ENTROPY, FIRST_TOKEN_ENTROPY = "srpo/teacher_entropy", "actor/first_token_entropy"
WATCHED = {
    LENGTH: ("response length", "tokens"),
    CORRECT_LENGTH: ("length of correct responses", "tokens"),
    TEACHER_ENTROPY: ("teacher entropy", "nats"),
    FIRST_TOKEN_ENTROPY: ("entropy of the first token", "nats"),
    REWARD: ("reward", ""),
    TRUNCATED: ("share of responses that end", ""),  # 1 − the metric, so that it falls like the others
}
SUGGESTED_MIN_LENGTH = 0.8


@dataclass
class History:
    """One metric: its newest values, at most WINDOW, and the highest mean of so many that was seen."""

    recent: list[float] = field(default_factory=list)
    highest: float = 0.0

    def add(self, value: float) -> None:
        """Values that are not finite are left out."""
        if math.isfinite(value):
            self.recent = [*self.recent, value][-WINDOW:]
            if len(self.recent) == WINDOW:
                self.highest = max(self.highest, self.mean)

    @property
    def mean(self) -> float:
        return math.fsum(self.recent) / len(self.recent)

    @property
    def share(self) -> float:
        """The present mean as a share of the highest one; 1 until there is one."""
        return self.mean / self.highest if self.highest > 0 else 1.0


class CollapseAlarm:
    """Warns when responses collapse, and by configuration ends the run. After a warning the history begins again, so
    that a run that goes on is warned again if its responses fall as far once more."""

    def __init__(self, config: Config, state: State) -> None:
        self._config = config
        self._histories = {name: _restored(state.get(name)) for name in WATCHED}

    def watch(self, iteration: int, metrics: Mapping[str, float], log: Log) -> str:
        """One iteration's metrics; returns why the run should stop, or ""."""
        if not self._config.train.collapse_share:
            return ""
        self._remember(metrics)
        if not self._collapses():
            return ""
        log.warn(f"iteration {iteration}: {self._fallen()} {self._advice(iteration, metrics)}")
        self._histories = {name: History() for name in WATCHED}
        if not self._config.train.stop_on_collapse:
            return ""
        return (
            "its responses collapse (train.stop_on_collapse), and the warning above says what falls and which settings "
            "help. This iteration is saved, and a run with other settings goes on from it; to go on from an earlier "
            "checkpoint, remove the later ones"
        )

    def state_dict(self) -> State:
        """Where a resumed run goes on."""
        return {name: [history.highest, *history.recent] for name, history in self._histories.items()}

    def _remember(self, metrics: Mapping[str, float]) -> None:
        found = {name: metrics[name] for name in WATCHED if name in metrics}
        if self._histories[CORRECT_LENGTH].recent and LENGTH in found:
            found.setdefault(CORRECT_LENGTH, found[LENGTH])  # no response is correct any more
        for name, value in found.items():
            self._histories[name].add(1 - float(value) if name == TRUNCATED else float(value))

    def _collapses(self) -> bool:
        length, correct = self._histories[LENGTH].share, self._histories[CORRECT_LENGTH]
        length = max(length, correct.share) if correct.recent else length
        entropies = (self._histories[name].share for name in (TEACHER_ENTROPY, FIRST_TOKEN_ENTROPY))
        worse = self._histories[REWARD].share < LOW_REWARD
        early = length < EARLY_LENGTH and (worse or any(share < LOW_ENTROPY for share in entropies))
        endless = worse and self._histories[TRUNCATED].share < EARLY_ENDED
        return early or endless or length < self._config.train.collapse_share

    def _fallen(self) -> str:
        low = max(EARLY_ENDED, self._config.train.collapse_share)
        fallen = [
            " ".join([WATCHED[name][0], _short(history.highest), "→", _short(history.mean), *WATCHED[name][1].split()])
            + f" ({history.share:.0%})"
            for name, history in self._histories.items()
            if history.share < low
        ]
        return f"responses collapse. Means of {WINDOW} iterations, the highest and now: {', '.join(fallen)}."

    def _advice(self, iteration: int, metrics: Mapping[str, float]) -> str:
        algorithm, teacher = self._config.algorithm, self._config.teacher
        if algorithm.teaching is None:
            return "What may help: a reward that looks at more than the final answer, or algorithm.kl_loss_coef."
        helps = []
        if not getattr(algorithm, "distill_iterations", 1) and not getattr(algorithm, "distill_patience", 1):
            helps.append(
                "algorithm.distill_patience = 10 with distill_decay = 10, or algorithm.distill_iterations (fewer than "
                f"{iteration}): reinforce afterwards"
            )
        if "solution" in algorithm.teaching.sources:
            helps.append('algorithm.teachers without "solution" (a model that cannot use a solution is no teacher)')
        if algorithm.teaching.sibling_min_length < SUGGESTED_MIN_LENGTH:
            helps.append(f"algorithm.sibling_min_length = {SUGGESTED_MIN_LENGTH} (no short demonstrations)")
        if teacher.mode == "ema":
            updates = iteration
            if teacher.update_every == "step":
                updates = int(metrics.get("actor/optimizer_steps", iteration))
            kept = (1 - teacher.update_rate) ** updates
            helps.append(f'teacher.mode = "refresh" or "frozen" (the EMA teacher is {kept:.1%} initial model)')
        elif teacher.mode in ("live", "trust_region"):
            helps.append('teacher.mode = "refresh" or "frozen"')
        elif teacher.mode == "refresh" and teacher.refresh_when == "always":
            helps.append('teacher.refresh_when = "improved"')
        return f"What may help: {'; '.join(helps or ['a reward that looks at more than the final answer'])}."


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _restored(saved: object) -> History:
    """A history from a checkpoint: its highest mean, then its newest values."""
    if not isinstance(saved, list) or not saved:
        return History()
    highest, *recent = (float(value) for value in saved)
    return History(recent, highest)
