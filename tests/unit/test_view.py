"""The command `view` shows what rollouts.jsonl and an evaluation's file say."""

import itertools
import json
import types

import pytest

from megatron_srpo.algorithms.report import branch
from megatron_srpo.commands.view import main
from megatron_srpo.config import Config
from megatron_srpo.observe import Observer
from megatron_srpo.observe.rollouts import BRANCHES, evaluated_record
from tests.unit.test_observe_rollouts import routed


@pytest.fixture
def run(tmp_path):
    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, run={"output_dir": str(tmp_path)},
        observe={"tensorboard": False, "progress": "off"},
    )  # fmt: skip
    observer = Observer(config, decode=lambda ids: f"taught with {len(ids)} tokens")
    observer.record(1, routed([[1, 0, 0], [0, 0, 0]]))
    observer.record(2, routed([[1, 1, 0], [0, 1, 1]]))
    observer.close()
    return tmp_path


def shown(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_files_of_evaluations_are_named(run, capsys):
    assert "Evaluations have" not in shown(capsys, run)
    (run / "eval").mkdir()
    file = run / "eval" / "test.jsonl"
    file.write_text("")
    assert f"Evaluations have files of their own: {file}" in " ".join(shown(capsys, run).split())


def test_the_newest_iteration_with_its_texts(run, capsys):
    text = shown(capsys, run)
    assert 'iteration 2 · train:0 · kind exact · 2 of 3 correct · answer "7"' in text
    assert "question 0" in text and "answer 0.2" in text
    assert "── response 2 · score 0 · 3 tokens, stop · sdpo: wrong, taught by sibling, advantage -0.667" in text
    assert "read as: 8" in text and "the reward failed: time-out" in text and "feedback: wrong wrong" in text
    assert "1 more of such prompts: --prompts 2" in text
    assert "taught with" not in text


def test_a_chosen_iteration_branch_outcome_and_the_teacher(run, capsys):
    text = shown(capsys, run, "--iteration", 1, "--branch", "sdpo", "--teacher")
    assert "iteration 1 ·" in text and "── response 0" not in text and "response 1" in text
    assert text.count("taught with 3 tokens") == 2 and "the teacher sees response 0" in text
    assert "more of such prompts" not in text  # the other prompt has no teacher
    text = shown(capsys, run, "--correct", "--uid", "train:1")
    assert "2 of 3 correct" in text and "── response 0" not in text and "its texts were not kept" in text


def test_long_texts_keep_their_end_and_control_characters_are_escaped(tmp_path, capsys):
    groups = routed([[1, 0], [0, 1]])
    groups[0].attempts[0].rollout.text = "begin" + "x" * 100 + "\x1b[2Jend"
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(evaluated_record(group)) + "\n" for group in groups))
    text = shown(capsys, file, "--characters", 20)
    assert "begin" in text and "\\x1b[2Jend" in text and "\x1b[2J" not in text and "x" * 50 not in text
    assert "x" * 100 in shown(capsys, file, "--characters", 0)
    assert "xxx" not in shown(capsys, file, "--characters", 1)
    assert "train:1" in shown(capsys, file, "--wrong", "--prompts", 9)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--iteration", "9"], "nothing to show of iteration 9: it has iterations 1 to 2"),
        (["--kind", "mcq"], "none of the 2 prompts of iteration 2"),
        (["--branch", "guided"], "Branches: grpo, sdpo."),
        (["--branch", "none"], "--branch none: expected one of grpo, sdpo, mix, guided, out"),
        (["--correct", "--wrong"], "expected one of them"),
    ],
)
def test_what_is_not_there_is_one_message(run, capsys, arguments, expected):
    assert main([str(run), *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_files_that_are_something_else_are_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "expected a run's folder with rollouts.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert main([str(tmp_path / "metrics.jsonl")]) == 2
    assert "line 1 of" in capsys.readouterr().err
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1, "groups": [')
    assert main([str(tmp_path)]) == 2
    assert "no iteration is finished yet" in capsys.readouterr().err
    (tmp_path / "weights.bin").write_bytes(b"\x80\xff\x00")
    assert main([str(tmp_path / "weights.bin")]) == 2
    assert "weights.bin is no text: expected" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text("")
    assert main([str(tmp_path / "test.jsonl")]) == 2
    assert "test.jsonl is empty" in capsys.readouterr().err


def test_an_evaluation_has_no_teacher_and_says_so_once(tmp_path, capsys):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(evaluated_record(group)) + "\n" for group in routed([[1, 0], [0, 1]])))
    assert main([str(file), "--teacher"]) == 0
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "has no teacher's prompts" in told.err and "response 0" in told.out


def test_every_branch_that_a_sample_may_have_is_known():
    found = set()
    for count in range(4):
        for terms in itertools.combinations(("policy", "guided", "distill"), count):
            found.add(branch(types.SimpleNamespace(weights=dict.fromkeys(terms, 1.0))))
    assert found == set(BRANCHES)
