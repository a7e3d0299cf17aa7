"""The terminal: plain lines for log files, a live display for people."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from megatron_srpo.observe.progress import Clock, LiveDisplay, PlainLines, Silent, duration, open_progress, sparkline

METRICS = {
    "critic/score/mean": 0.53125,
    "srpo/grpo_fraction": 0.625,
    "srpo/sdpo_fraction": 0.375,
    "response_length/mean": 6.04,
    "perf/tokens_per_second": 3512.4,
    "timing_s/step": 1.84,
}


class FakeTime:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def console_of(terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ={})


def test_plain_output_is_a_line_an_iteration():
    console, time = console_of(False, width=20), FakeTime()
    progress = open_progress("auto", name="r", total=60, console=console, clock=Clock(60, 0, time))
    assert type(progress) is PlainLines
    progress.update(0, {"eval/accuracy": 0.25, "eval/prompts": 200})
    time.now += 2
    progress.update(1, METRICS)
    time.now += 2
    progress.update(2, METRICS | {"eval/accuracy": 0.5})
    progress.message("[bold]data: 3 [prompts]")
    assert console.file.getvalue().splitlines() == [
        "iteration  0/60 · held-out accuracy 0.250 (200 prompts)",
        "iteration  1/60 · reward 0.531 · GRPO 62% · SDPO 38% · length 6.0 · tokens/s 3,512 · s/it 1.8 · left 1:58",
        "iteration  2/60 · reward 0.531 · GRPO 62% · SDPO 38% · length 6.0 · tokens/s 3,512 · s/it 1.8 · left 1:56"
        " · held-out accuracy 0.500",
        "[bold]data: 3 [prompts]",
    ]


def test_a_terminal_that_is_a_file_on_a_full_disk_stops_nothing_and_gets_its_lines_later():
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Full()
    progress = open_progress("plain", name="r", total=60, console=Console(file=disk, _environ={}))
    progress.update(1, METRICS)
    progress.message("a warning")
    disk.full = False
    progress.message("room again")
    assert [line[:16] for line in disk.getvalue().splitlines()] == ["iteration  1/60 ", "a warning", "room again"]


def test_live_output_shows_the_iteration_the_branches_the_speed_and_the_time_left():
    console, time = console_of(True), FakeTime()
    display = LiveDisplay(console, "quickstart", 60, 0, Clock(60, 0, time))
    try:
        assert "first iteration" in shown(display)
        time.now += 3
        display.update(1, METRICS | {"eval/accuracy": 0.5})
        time.now += 1
        display.update(2, METRICS)
        text = shown(display)
    finally:
        display.close()
    for part in ("quickstart", "2/60", "0:04 elapsed, 0:58 left", "reward 0.531", "GRPO 62%", "SDPO 38%",
                 "tokens/s 3,512", "held-out accuracy 0.500"):  # fmt: skip
        assert part in text
    display.message("done")
    assert "done" in console.file.getvalue()


def shown(display: LiveDisplay) -> str:
    console = console_of(False)
    console.print(display.render())
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("mode", "terminal", "kind"),
    [
        ("auto", True, LiveDisplay),
        ("auto", False, PlainLines),
        ("live", False, LiveDisplay),
        ("plain", True, PlainLines),
        ("off", True, Silent),
    ],
)
def test_the_mode_decides_what_is_shown(mode, terminal, kind):
    progress = open_progress(mode, name="r", total=2, console=console_of(terminal))
    progress.close()
    assert type(progress) is kind


def test_off_shows_messages_only():
    console = console_of(True)
    progress = open_progress("off", name="r", total=2, console=console)
    progress.update(1, METRICS)
    progress.message("done")
    assert console.file.getvalue() == "done\n"


def test_the_first_iteration_is_no_measure_of_the_time_left_once_there_are_others():
    time = FakeTime()
    clock = Clock(12, 0, time)
    assert clock.left is None
    time.now += 60
    clock.tick(1)
    assert clock.left == 60 * 11
    time.now += 2
    clock.tick(2)
    assert clock.left == pytest.approx(2 * 10)
    assert clock.elapsed == 62


def test_a_continued_run_counts_from_where_it_is():
    time = FakeTime()
    clock = Clock(12, 10, time)
    time.now += 5
    clock.tick(11)
    assert clock.left == 5


def test_small_formats():
    assert [duration(s) for s in (None, 0, 89.6, 3700)] == ["–", "0:00", "1:30", "1:01:40"]
    assert sparkline([0, 0.5, 1]) == "▁▅█" and sparkline([2, 2]) == "▁▁" and sparkline([math.nan]) == ""
    assert len(sparkline(list(range(100)))) == 24
