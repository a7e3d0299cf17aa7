"""Shows a run's progress: a live display in a terminal, otherwise one plain line for each iteration."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol, SupportsFloat

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_srpo.core.text import visible

RECENT = 20  # the remaining time is estimated from this many iterations
BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24

Metrics = Mapping[str, SupportsFloat]  # of one step, by name


class Clock:
    """Measures iterations and estimates the remaining time. `now` returns monotonic seconds."""

    def __init__(self, total: int, start: int, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._now = total, now
        self._began = self._last = now()
        self._last_step = start
        self._durations: deque[float] = deque(maxlen=RECENT)

    def tick(self, step: int) -> None:
        """Record the end of an iteration. A repeated step (an evaluation of its own) is not counted."""
        now = self._now()
        if step > self._last_step:
            if self._last_step and len(self._durations) == 1:
                self._durations.clear()  # the first iteration includes warm-up, so it says nothing about the others
            self._durations.append((now - self._last) / (step - self._last_step))
            self._last_step = step
        self._last = now

    @property
    def elapsed(self) -> float:
        return self._now() - self._began

    @property
    def left(self) -> float | None:
        """Estimated seconds to the end; None until the first iteration has ended."""
        if not self._durations:
            return None
        each = sum(self._durations) / len(self._durations)
        return each * max(0, self._total - self._last_step)


def duration(seconds: float | None) -> str:
    """Seconds as text: 90 → 1:30, 3700 → 1:01:40, None → –."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: list[float]) -> str:
    """The last values as a row of bars, scaled between their minimum and their maximum."""
    shown = [value for value in values if value == value][-SPARK_WIDTH:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def facts(metrics: Metrics) -> list[tuple[str, str]]:
    """The (name, value) pairs that are displayed, for those metrics that exist."""
    shown = (
        ("reward", "critic/score/mean", "{:.3f}"),
        ("GRPO", "srpo/grpo_fraction", "{:.0%}"),
        ("SDPO", "srpo/sdpo_fraction", "{:.0%}"),
        ("guided", "srpo/guided_fraction", "{:.0%}"),
        ("length", "response_length/mean", "{:.1f}"),
        ("tokens/s", "perf/tokens_per_second", "{:,.0f}"),
        ("s/it", "timing_s/step", "{:.1f}"),
    )
    found = [(what, style.format(float(metrics[key]))) for what, key, style in shown if key in metrics]
    both = sum(float(metrics.get(key, 0)) for key in ("srpo/grpo_fraction", "srpo/sdpo_fraction")) > 1 + 1e-6
    return [
        ("and SDPO" if both and what == "SDPO" else what, value) for what, value in found
    ]  # mix: a sample takes both


def evaluation(metrics: Metrics) -> str:
    """The result of the evaluation in words; "" if there is none."""
    if "eval/accuracy" not in metrics:
        return ""
    prompts = f" ({int(float(metrics['eval/prompts']))} prompts)" if "eval/prompts" in metrics else ""
    accuracy = float(metrics["eval/accuracy"])
    score = float(metrics.get("eval/score", accuracy))
    partial = f", mean score {score:.3f}" if abs(score - accuracy) > 1e-9 else ""  # rewards between wrong and right
    return f"held-out accuracy {accuracy:.3f}{partial}{prompts}"


class Progress(Protocol):
    """Shows iterations and messages."""

    def update(self, step: int, metrics: Metrics) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Mode "off": shows messages only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def update(self, step: int, metrics: Metrics) -> None:
        pass

    def message(self, text: str) -> None:
        _print(self._console, text)

    def close(self) -> None:
        pass


class PlainLines(Silent):
    """Mode "plain": one line for each iteration, for log files."""

    def __init__(self, console: Console, total: int, clock: Clock) -> None:
        super().__init__(console)
        self._total, self._clock = total, clock

    def update(self, step: int, metrics: Metrics) -> None:
        self._clock.tick(step)
        heading = f"iteration {step:>{len(str(self._total))}}/{self._total}"
        parts = [f"{what} {value}" for what, value in facts(metrics)]
        if parts:
            parts.append(f"left {duration(self._clock.left)}")
        held_out = evaluation(metrics)
        if held_out:
            parts.append(held_out)
        if parts:
            _print(self._console, " · ".join([heading, *parts]))


class LiveDisplay:
    """Mode "live": a bar and two lines of numbers that stay at the bottom of the terminal."""

    def __init__(self, console: Console, name: str, total: int, start: int, clock: Clock) -> None:
        self._name, self._total, self._clock = name, total, clock
        self._step = start
        self._metrics: Metrics = {}
        self._rewards: list[float] = []
        self._held_out = ""
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=2)
        self._live.start()

    def update(self, step: int, metrics: Metrics) -> None:
        self._clock.tick(step)
        self._step = step
        if "critic/score/mean" in metrics:
            self._metrics = dict(metrics)
            self._rewards = [*self._rewards, float(metrics["critic/score/mean"])][-SPARK_WIDTH:]
        self._held_out = evaluation(metrics) or self._held_out

    def message(self, text: str) -> None:
        _print(self._live.console, text)

    def close(self) -> None:
        self._live.stop()

    def render(self) -> Group:
        """The display as it is now. The thread of the live display calls it."""
        top = Table.grid(padding=(0, 2))
        top.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=self._total, completed=self._step, width=30),
            Text(f"{self._step}/{self._total}"),
            Text(f"{duration(self._clock.elapsed)} elapsed, {duration(self._clock.left)} left", style="dim"),
        )
        if not self._metrics:
            return Group(top, Text("  the first iteration is running …", style="dim"))
        reward, *others = facts(self._metrics)
        score = Text.assemble("  ", (f"{reward[0]} ", "dim"), (reward[1], "bold green"))
        score.append(f" {sparkline(self._rewards)}", style="green")
        score.append(f"  {self._held_out}", style="cyan")
        numbers = Text("  ")
        for what, value in others:
            numbers.append(f"{what} ", style="dim").append(f"{value}   ", style="bold")
        return Group(top, score, numbers)


def _print(console: Console, text: str) -> None:
    # Standard output may be a file on a full disk. Training continues, and rich writes the text later.
    with suppress(OSError):
        # No mark-up, colours or wrapping: the text may be anybody's, and a log file has no width.
        console.print(visible(text), markup=False, highlight=False, soft_wrap=True)
        console.file.flush()


def open_progress(
    mode: str, *, name: str, total: int, start: int = 0, console: Console | None = None, clock: Clock | None = None
) -> Progress:
    """The display for `mode` (auto, live, plain or off). "auto" is live in a terminal that can move its cursor, and
    plain everywhere else."""
    console = console or Console()
    clock = clock or Clock(total, start)
    if mode == "auto":
        mode = "live" if console.is_terminal and not console.is_dumb_terminal else "plain"
    if mode == "live":
        return LiveDisplay(console, name, total, start, clock)
    return PlainLines(console, total, clock) if mode == "plain" else Silent(console)
