"""Figures and the table of a comparison."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from PIL import Image

from megatron_srpo.core.errors import UserError
from megatron_srpo.observe.report import (
    Interval,
    comparison_table,
    load_curve,
    mean_interval,
    plot_comparison,
    plot_run,
    smoothed,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(path, offset=0.0, steps=12, **constant):
    rows = [
        {"step": i, "critic/score/mean": offset + i / 20, "srpo/sdpo_fraction": 0.5 - i / 40, **constant}
        for i in range(1, steps + 1)
    ]
    rows[5]["eval/accuracy"] = offset + 0.25
    rows[11]["eval/accuracy"] = offset + 0.5
    return write(path, rows)


def colours(path) -> set:
    image = Image.open(path)
    image.load()
    return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}


def test_a_runs_figure_shows_what_was_measured(tmp_path):
    constant = {"srpo/teacher_entropy": 0.3, "response_length/mean": 6, "rollout_corr/logprob_diff_mean": 1e-6}
    picture = plot_run(run_of(tmp_path / "m.jsonl", **constant), tmp_path / "new/curves.png")
    assert picture == tmp_path / "new/curves.png"
    shown = colours(picture)
    blue, orange, green, purple, red = (47, 111, 179), (224, 123, 38), (58, 146, 58), (125, 95, 178), (194, 59, 59)
    assert {blue, orange, green, purple, red} <= shown
    bare = plot_run(write(tmp_path / "bare.jsonl", [{"step": 1, "critic/score/mean": 0.5}]), tmp_path / "bare.png")
    assert blue in colours(bare) and purple not in colours(bare)


def test_a_figure_can_be_drawn_from_values_that_are_not_finite_or_not_positive(tmp_path):
    rows = [{"step": i, "actor/grad_norm": "NaN", "rollout_corr/logprob_diff_mean": 0.0} for i in range(20)]
    assert plot_run(write(tmp_path / "m.jsonl", rows), tmp_path / "c.png").exists()


def test_a_comparison_returns_means_and_95_percent_intervals_over_seeds(tmp_path):
    runs = {
        "srpo": [run_of(tmp_path / f"s{i}.jsonl", offset) for i, offset in enumerate((0.1, 0.2, 0.3))],
        "grpo": [run_of(tmp_path / "g.jsonl")],
        "empty": [],
    }
    table = plot_comparison(runs, tmp_path / "compare.png", metrics=("eval/accuracy", "srpo/teacher_entropy"))
    assert set(table) == {"eval/accuracy", "srpo/teacher_entropy"}
    accuracy = table["eval/accuracy"]
    assert list(accuracy) == ["srpo", "grpo"] and list(accuracy["srpo"]) == [6, 12]
    expected = 4.30 * statistics.stdev([0.6, 0.7, 0.8]) / math.sqrt(3)
    assert accuracy["srpo"][12] == pytest.approx(Interval(0.7, expected))
    assert accuracy["grpo"][6].mean == 0.25 and math.isnan(accuracy["grpo"][6].half_width)
    assert table["srpo/teacher_entropy"]["srpo"] == {}
    assert {(58, 146, 58), (47, 111, 179)} <= colours(tmp_path / "compare.png")


def test_only_steps_that_all_seeds_have_are_compared(tmp_path):
    full, short = [{"step": i, "eval/accuracy": 0.5} for i in range(3)], [{"step": 0, "eval/accuracy": 1.0}]
    runs = {"srpo": [write(tmp_path / "a.jsonl", full), write(tmp_path / "b.jsonl", short)]}
    table = plot_comparison(runs, tmp_path / "c.png", metrics=("eval/accuracy",))
    assert {step: value.mean for step, value in table["eval/accuracy"]["srpo"].items()} == {0: 0.75}


def test_the_table_has_a_row_a_method():
    curves = {"srpo": {s: Interval(s / 100, 0.0125) for s in range(0, 101, 10)}, "grpo": {100: Interval(0.5, math.nan)}}
    assert comparison_table(curves, columns=3).splitlines() == [
        "| method | step 0 | step 50 | step 100 |",
        "|---|---|---|---|",
        "| srpo | 0.000 ± 0.013 | 0.500 ± 0.013 | 1.000 ± 0.013 |",
        "| grpo | – | – | 0.500 |",
    ]


def test_many_seeds_use_the_normal_quantile():
    values = [float(i % 2) for i in range(40)]
    assert mean_interval(values).half_width == pytest.approx(1.96 * statistics.stdev(values) / math.sqrt(40))


def test_curves_are_read_by_name_and_the_last_record_of_a_step_counts():
    records = [{"step": 2, "a": 1}, {"step": 1, "a": "0.5"}, {"step": 2, "a": 3}, {"step": 3, "a": "NaN"}, {"step": 4}]
    assert load_curve(records, "a") == {1: 0.5, 2: 3.0}


def test_smoothing_keeps_a_line_straight_inside():
    assert smoothed([0.0, 1.0, 2.0, 3.0, 4.0], 3) == [0.5, 1.0, 2.0, 3.0, 3.5]


@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), ("", "has no metrics"), ("not json\n", "has no metrics")]
)
def test_a_file_without_metrics_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as refusal:
        plot_run(path, tmp_path / "c.png")
    assert str(path) in str(refusal.value)
    with pytest.raises(UserError, match="no run to compare"):
        plot_comparison({"srpo": []}, tmp_path / "c.png")
