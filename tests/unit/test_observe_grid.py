"""Several finished runs: axes of hours and tokens, 5-step means, and the tables of the SRPO paper."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from megatron_srpo.core.errors import UserError
from megatron_srpo.observe import published
from megatron_srpo.observe.curves import AXES, Interval, positions, rolling
from megatron_srpo.observe.grid import read_run, tables, write_report
from megatron_srpo.observe.report import plot_comparison, plot_run
from megatron_srpo.run import cli

HALF_AN_HOUR = 1800.0


def made_run(folder, method="srpo", benchmark="chemistry", *, accuracy, model="Qwen3-8B", own_name="", **changes):
    """A run whose iterations take half an hour each, evaluated before the first and after each."""
    folder.mkdir(parents=True)
    usual = {"timing_s/step": HALF_AN_HOUR, "perf/total_tokens": 2e6, "response_length/mean": 300.0, **changes}
    rows = [{"step": 0, "eval/accuracy": accuracy[0]}]
    rows += [{"step": step, "eval/accuracy": value, **usual} for step, value in enumerate(accuracy[1:], 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(
        f'[run]\nbenchmark = "{benchmark}"\nmethod = "{own_name}"\n[model]\npath = "a/{model}"\n'
        f'[algorithm]\nname = "{method}"\n'
    )
    return folder


def rows_of(text, heading):
    """The rows of the table under a heading: first cell → the other cells."""
    part = text.split(f"## {heading}\n\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_a_step_stands_at_the_hours_and_tokens_that_all_iterations_up_to_it_took():
    records = [{"step": 0}, *({"step": i, "timing_s/step": 900.0, "perf/total_tokens": 5e5} for i in (1, 2, 4))]
    assert positions(records, "iterations") == {0: 0, 1: 1, 2: 2, 4: 4}
    assert positions(records, "hours") == {0: 0, 1: 0.25, 2: 0.5, 4: 1.0}  # the lost iteration took as long as the next
    assert positions(records, "tokens") == {0: 0, 1: 0.5, 2: 1.0, 4: 2.0}
    assert positions([*records, {"step": 2, "timing_s/step": 1800.0}], "hours")[4] == 1.25  # the last record counts
    with pytest.raises(UserError, match="no timing_s/step, from which hours are counted"):
        positions([{"step": 1, "critic/score/mean": 1.0}], "hours")


def test_the_band_is_the_five_step_mean_and_its_standard_deviation_over_all_seeds():
    one, two = {i: float(i) for i in range(8)}, {i: float(i) + 1 for i in range(7)}
    found = rolling([one, two])
    values = [*range(2, 7), *range(3, 8)]
    assert list(found) == list(range(7))  # steps of both
    assert found[6] == pytest.approx(Interval(statistics.fmean(values), statistics.stdev(values)))
    assert found[0] == pytest.approx(Interval(0.5, statistics.stdev([0, 1])))
    assert math.isnan(rolling([one])[0].half_width) and rolling([]) == {}


def test_a_run_of_adapters_is_no_seed_of_a_run_of_all_weights(tmp_path):
    folders = [made_run(tmp_path / name, accuracy=[0.4, 0.5]) for name in ("whole", "adapters")]
    with (folders[1] / "config.toml").open("a") as file:
        file.write("[lora]\nrank = 16\n")
    assert [read_run(folder).method for folder in folders] == ["srpo", "srpo (LoRA)"]


def test_tables_show_the_best_within_hours_beside_the_papers_numbers(tmp_path):
    runs = [
        made_run(tmp_path / "a", accuracy=[0.40, 0.5, 0.7, 0.6, *[0.65] * 7, 0.8], **{"srpo/teacher_entropy": 1.0}),
        made_run(tmp_path / "b", accuracy=[0.42, 0.5, 0.6, 0.6, *[0.65] * 7, 0.9]),
        made_run(tmp_path / "c", method="grpo", accuracy=[0.41, 0.3]),
    ]
    text = tables([read_run(folder) for folder in runs])
    assert text.startswith("# Qwen3-8B\n")
    assert rows_of(text, "Best accuracy within 1 h") == {
        "method": ["chemistry", "mean of five"], "---": ["---", "---"],
        "base": ["41.0 ± 1.0 (41.1)", "(49.5)"], "srpo": ["65.0 ± 7.1", "(66.9)"], "grpo": ["41.0*", "–"],
    }  # fmt: skip
    assert rows_of(text, "Best accuracy within 5 h")["srpo"] == ["67.5 ± 3.5", "(75.5)"]
    assert rows_of(text, "Best accuracy within 10 h")["srpo"] == ["85.0* ± 7.1 (83.0)", "(77.4)"]
    seconds = rows_of(text, "Seconds of an iteration")
    assert seconds["srpo"] == ["1800.0 ± 0.0 (83.4)", "1800.0 ± 0.0 (78.3)", "1800.0* ± 0.0 (75.8)"]
    assert "A star marks runs that ended before" in text


def test_runs_of_another_task_get_no_tables_of_hours_that_they_did_not_run_and_no_mean_of_five(tmp_path):
    text = tables([read_run(made_run(tmp_path / "a", benchmark="", accuracy=[0.1, 0.2]))])
    assert text.count("## Best accuracy") == 1 and "mean of five" not in text
    assert rows_of(text, "Best accuracy within 1 h")["srpo"] == ["20.0*"] and "first 5 h" not in text


def test_runs_without_an_evaluation_are_named(tmp_path):
    evaluated, without = (made_run(tmp_path / name, accuracy=[0.1, 0.2]) for name in "ab")
    (without / "metrics.jsonl").write_text('{"step": 1, "timing_s/step": 1.0}\n')
    told = tables([read_run(evaluated), read_run(without)]).split("No evaluation, and so no accuracy, has: ")[1]
    assert told.startswith(f"{without}. ") and "No evaluation" not in tables([read_run(evaluated)])


def test_the_mean_needs_all_five_benchmarks(tmp_path):
    names = published.BENCHMARKS
    folders = [
        made_run(tmp_path / name, benchmark=name, accuracy=[0.1, *[0.2 + i / 10] * 20]) for i, name in enumerate(names)
    ]
    whole = rows_of(tables([read_run(folder) for folder in folders]), "Best accuracy within 10 h")
    assert whole["method"] == [*names, "mean of five"] and whole["srpo"][-1] == "40.0 (77.4)"
    assert whole["base"][-1] == "10.0 (49.5)"
    less = rows_of(tables([read_run(folder) for folder in folders[1:]]), "Best accuracy within 10 h")
    assert less["srpo"][-1] == "(77.4)"


def test_the_papers_means_are_those_of_its_columns():
    for method in published.numbers()["accuracy"]["Qwen3-8B"].values():
        for numbers in method.values():
            found = [numbers[name] for name in published.BENCHMARKS if name in numbers]
            assert not found or statistics.fmean(found) == pytest.approx(numbers["mean"], abs=0.06)


def test_runs_of_one_benchmark_make_a_figure_on_each_axis_and_ablations_keep_their_names(tmp_path):
    for axis in AXES:
        folders = [
            made_run(tmp_path / axis / "s", accuracy=[0.1, 0.2, 0.3]),
            made_run(tmp_path / axis / "u", accuracy=[0.1, 0.2, 0.3], own_name="srpo-unweighted"),
            made_run(tmp_path / axis / "p", benchmark="physics", accuracy=[0.1, 0.2]),
        ]
        written = write_report([read_run(folder) for folder in folders], tmp_path / axis / "out", axis)
        assert [file.name for file in written] == [
            "report.md", f"Qwen3-8B-chemistry-{axis}.png", f"Qwen3-8B-physics-{axis}.png"
        ]  # fmt: skip
        assert all(file.stat().st_size > 500 for file in written)
    assert "| srpo-unweighted | 30.0* " in written[0].read_text()


def test_a_comparison_over_hours_keeps_its_table_by_step(tmp_path):
    run = made_run(tmp_path / "r", accuracy=[0.1, 0.2, 0.3]) / "metrics.jsonl"
    drawn = {
        axis: plot_comparison({"srpo": [run]}, tmp_path / f"{axis}.png", ("eval/accuracy",), axis=axis) for axis in AXES
    }
    assert {step: v.mean for step, v in drawn["hours"]["eval/accuracy"]["srpo"].items()} == {0: 0.1, 1: 0.2, 2: 0.3}
    assert plot_run(run, tmp_path / "run.png", "tokens").exists()
    pictures = {(tmp_path / f"{axis}.png").read_bytes() for axis in AXES}
    assert len(pictures) == 3


def test_the_command_reports_one_run_or_several(tmp_path, capfd):
    one = made_run(tmp_path / "runs/one", accuracy=[0.1, 0.2])
    two = made_run(tmp_path / "runs/two", method="grpo", accuracy=[0.1, 0.3])
    assert cli.main(["report", str(one), "--axis", "hours"]) == 0
    assert (one / "curves_hours.png").exists()
    assert cli.main(["report", str(one), str(two)]) == 0
    assert (tmp_path / "runs/report.md").exists() and (tmp_path / "runs/Qwen3-8B-chemistry-iterations.png").exists()
    assert "| grpo | 30.0* | – |" in capfd.readouterr().out
    assert cli.main(["report", str(one), "--axis", "days"]) == 2
    assert "expected --axis iterations, hours, tokens, got days" in capfd.readouterr().err
    (one / "config.toml").write_text("not toml")
    assert cli.main(["report", str(one), str(two)]) == 2
    assert "config.toml cannot be read" in capfd.readouterr().err
