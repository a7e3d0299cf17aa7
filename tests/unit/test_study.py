"""The study: its statistics against values from tables, what it compares, and what it counts as a collapse."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import results, table
from benchmarks.study.collapse import collapse_of
from benchmarks.study.methods import METHODS, SELECTION_SEED
from benchmarks.study.reward import letter
from benchmarks.study.statistics import holm, paired_p, two_sided_p
from benchmarks.study.tally import Tally
from benchmarks.study.tasks import TASKS
from megatron_srpo import api
from megatron_srpo.observe.report import STUDENT_T

RESULTS = Path(__file__).parents[2] / results.RESULTS
RATES = TASKS["tally"].grid


def test_p_values_agree_with_the_table_of_students_t():
    for freedom, quantile in enumerate(STUDENT_T, 1):  # its values have two decimals
        assert two_sided_p(quantile - 0.006, freedom) > 0.05 > two_sided_p(quantile + 0.006, freedom)
    assert two_sided_p(4.785, 7) == pytest.approx(0.002, abs=2e-5) and two_sided_p(0.0, 4) == 1.0


def test_paired_p_looks_at_the_differences_alone():
    assert paired_p([1.0, 2.0, 3.0, 4.0]) == pytest.approx(two_sided_p(2.5 / math.sqrt(5 / 3 / 4), 3))
    assert paired_p([0.0, 0.0]) == 1.0 and paired_p([0.1, 0.1]) == 0.0 and math.isnan(paired_p([0.1]))


def test_holm_multiplies_by_the_comparisons_that_are_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def result_of(accuracies, *, lr=2e-4, tokens=1000, length=20.0, traced=None):
    rows = [[20 * i, tokens * i, 2.0 * i, accuracy, length] for i, accuracy in enumerate(accuracies)]
    return {"evaluations": rows, "lr": lr, "traced": traced or {"response_length/mean": [length] * 20}}


def test_methods_are_compared_at_what_grpo_uses_and_by_seed():
    grpo = {seed: result_of([0.1, 0.2, 0.3]) for seed in range(3)}
    srpo = {seed: result_of([0.1, 0.4, 0.5 + 0.01 * seed, 0.9], tokens=900) for seed in range(3)}
    found = table.compare({"task": {"grpo": grpo, "srpo": srpo}}, table.MEASURES[1])
    assert [round(one.accuracy.mean, 6) for one in found] == [0.3, 0.51]  # 1800 of 2000 tokens: not the 0.9
    (one,) = [one for one in found if one.method == "grpo"]
    assert (one.pairs, one.verdict) == (3, "worse") and one.difference.mean == pytest.approx(-0.21)


def test_only_runs_that_began_with_the_same_warm_start_are_pairs():
    srpo = {seed: result_of([[0.1, 0.11, 0.12][seed], 0.5]) for seed in range(3)}
    again = {seed: result_of([[0.2, 0.21, 0.22][seed], 0.6]) for seed in range(3)}
    other = {0: result_of([0.1, 0.4]), 1: result_of([0.21, 0.4]), 2: result_of([0.3, 0.4])}
    found = table.compare({"task": {"srpo": srpo, "srpo again": again, "other": other}}, table.MEASURES[1])
    assert [(one.method, one.pairs) for one in found] == [("srpo", 0), ("srpo again", 0), ("other", 2)]
    assert found[2].difference.mean == pytest.approx(-0.15)  # of 0.4 - 0.5 and 0.4 - 0.6


def test_a_method_without_pairs_is_not_judged():
    found = table.compare({"task": {"grpo": {0: result_of([0.1, 0.2])}, "srpo": {0: result_of([0.1, 0.3])}}},
                          table.MEASURES[1])  # fmt: skip
    assert [one.verdict for one in found] == ["", ""]


def test_a_collapse_is_short_responses_or_accuracy_that_stays_lost_and_an_alarm_must_come_before_that():
    healthy = collapse_of(result_of([0.1, 0.5, 0.38, 0.6]))
    assert (healthy.collapsed, healthy.alarm) == (False, None)
    lengths = [20.0] * 12 + [5.0] * 28
    traced = {"response_length/mean": lengths, "srpo/response_length_correct": lengths}
    lost = collapse_of(result_of([0.1, 0.5, 0.45, 0.2, 0.3], traced=traced))
    assert (lost.lost, lost.alarm, lost.collapsed, lost.in_time) == (60, 19, True, True)
    soon = collapse_of(result_of([0.5, 0.2, 0.3], traced=traced))  # lost somewhere between 0 and 20, told at 19
    assert (soon.lost, soon.alarm, soon.in_time, soon.maybe_in_time) == (20, 19, False, True)
    once = collapse_of(result_of([0.1, 0.5, 0.45, 0.3]))  # one evaluation may be chance
    assert (once.lost, once.collapsed) == (None, False)
    late = collapse_of(result_of([0.5, 0.2, 0.1], traced={"response_length/mean": [20.0] * 40}))
    assert (late.lost, late.alarm, late.in_time) == (20, None, False)


def test_the_alarm_came_where_responses_shrank_mostly_in_time_and_hardly_ever_in_healthy_runs():
    found = [collapse_of(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*/*/*.json"))]
    shrunk = [one for one in found if one.shrank]
    healthy = [one for one in found if not one.collapsed]
    assert len(shrunk) >= 10 and all(one.alarm is not None for one in shrunk)
    assert sum(one.in_time for one in shrunk) >= 0.4 * len(shrunk)
    assert sum(one.in_time or one.maybe_in_time for one in shrunk) >= 0.6 * len(shrunk)
    assert all(one.lost is None or one.alarm <= one.lost + 45 for one in shrunk)
    assert len(healthy) >= 10 and sum(one.alarm is not None for one in healthy) <= 0.1 * len(healthy)


def write(case, accuracies):
    case.file.parent.mkdir(parents=True, exist_ok=True)
    case.file.write_text(json.dumps({"request": case.request, **result_of(accuracies, lr=case.lr)}))


def test_the_rate_is_chosen_on_the_grid_alone_and_finished_runs_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    grpo = METHODS["grpo"]
    first = list(study.cases_of(["tally"], ["grpo"], 9))
    assert [(case.seed, case.lr, case.selects) for case in first] == [(SELECTION_SEED, lr, True) for lr in RATES]
    for case, end in zip(first, (0.3, 0.6, 0.5, 0.2, 0.1), strict=True):
        assert study.chosen_rate("tally", grpo) is None
        write(case, [0.9, 0.2, end])
    assert study.chosen_rate("tally", grpo) == RATES[1]
    cases = list(study.cases_of(["tally"], ["grpo"], 9))
    grid, total = len(RATES), len(RATES) + 8
    assert [case.seed for case in cases[grid:]] == list(range(8))
    assert study.total_of(["tally"], ["grpo"]) == (grid, total)
    write(cases[grid], [0.1, 0.5])
    assert results.finished(cases[grid]) and study.total_of(["tally"], ["grpo"]) == (grid + 1, total)
    changed = results.Case("tally", "grpo", 0, RATES[1], {**cases[grid].keys, "run.iterations": 7})
    assert results.finished(changed) is None  # another definition is another run


class Preparation:
    """Stands for a task whose warm start is still to be made."""

    def __init__(self, act):
        self.act, self.begun = act, 0

    def prepare(self, folder):
        self.begun += 1
        self.act()
        return {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_warm_start_stops_the_study_with_one_line(monkeypatch, capsys, number):
    task, before = Preparation(lambda: os.kill(os.getpid(), number)), signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(study.TASKS, "tally", task)
    for count in (1, 2):  # the next call begins it again
        assert study.main(["--tasks", "tally"]) == 130 and task.begun == count
        told = capsys.readouterr()
        assert told.out.count("\n") == 1 and told.out.startswith("stopped;") and told.err == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_warm_start_begins_when_the_minutes_are_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])
    first, second = Preparation(lambda: now.append(now.pop() + 61)), Preparation(lambda: None)
    monkeypatch.setitem(study.TASKS, "worksheet", first)
    monkeypatch.setitem(study.TASKS, "tally", second)
    assert study.main(["--tasks", "worksheet,tally", "--minutes", "1"]) == 0
    assert (first.begun, second.begun) == (1, 0)


@pytest.mark.parametrize("option", ["--minutes", "--seeds"])
@pytest.mark.parametrize("value", ["0", "-3", "x", "nan"])
def test_numbers_below_one_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        study.main(["status", option, value])
    assert f"argument {option}: expected a" in capsys.readouterr().err


def test_tables_that_count_more_runs_are_not_replaced(tmp_path, monkeypatch, capsys):
    for module in (results, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    for name in ("tables.md", "tables.json"):
        (tmp_path / name).write_text("# Tables\n\n26 runs, 0.2 CPU hours; x.\n")
    assert study.main(["table"]) == 2
    assert "counts 26 runs, and only 0 finished ones were found" in capsys.readouterr().err
    assert "26 runs" in (tmp_path / "tables.md").read_text() and "26 runs" in (tmp_path / "tables.json").read_text()
    (tmp_path / "tables.md").unlink()
    assert study.main(["table"]) == 0 and "0 runs" in (tmp_path / "tables.md").read_text()


def test_guards_use_the_rate_of_srpo(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert study.grid_of("tally", METHODS["srpo-floor"]) == []
    for case, end in zip(study.grid_of("tally", METHODS["srpo"]), (0.6, 0.3, 0.2, 0.1, 0.1), strict=True):
        write(case, [0.1, end])
    assert study.chosen_rate("tally", METHODS["srpo-floor"]) == RATES[0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_configuration_that_the_trainer_takes(method, task):
    case = study.case_of(task, METHODS[method], 0, RATES[0])
    config = api.load(results.CONFIG, {"model.path": "m", "data.train": "d", "data.test": "d", **case.keys})
    written = {key: value for key, value in case.keys.items() if key.startswith("algorithm.")}
    assert all(getattr(config.algorithm, key.partition(".")[2]) == value for key, value in written.items())


def test_a_tally_is_right_by_its_letter_alone_and_its_answers_follow_what_is_shown():
    task, rng = Tally(), random.Random(0)
    for _ in range(50):
        question = task.question(rng)
        solution = task.solution(question)
        last = eval("".join(question)) % 10  # modulo 10 at every step is modulo 10 at the end
        assert solution[-4:-1] == f"={last}#" and task.answer(question) == "abcd"[last % task.letters]
        assert letter(solution, task.answer(question), {}) == letter(f"#{task.answer(question)}", solution[-1], {}) == 1
        assert letter(solution + "#a", "a", {}) == letter("", "a", {}) == letter(solution[-1], solution[-1], {}) == 0
        assert len(solution) < task.max_new_tokens
        example = task.warm_start_example(rng, question, 0.9)
        assert (example.prompt.partition("A")[2] + example.target).count("#") == 1
        assert set(example.prompt + example.target) <= set(task.characters)


def test_the_sums_of_the_real_model_are_scored_and_their_test_questions_are_in_no_train_row(tmp_path, monkeypatch):
    from benchmarks.study import smollm2
    from megatron_srpo.rewards.registry import resolve

    monkeypatch.setattr(smollm2, "DATA", tmp_path)
    smollm2.place_data()
    train, test = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )
    assert len(test) == 200 and len(train) > 2000
    assert not {row["prompt"][-1]["content"] for row in train} & {row["prompt"][-1]["content"] for row in test}
    score = resolve("reasoning_gym")
    for row in test[:5]:
        assert score(f"<answer>{row['answer']}</answer>", row["answer"], row).score == 1
        assert score("<answer>x</answer>", row["answer"], row).score < 0.5
