"""Kinds are found by name or reference, mistakes are explained, and results have one form."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_srpo.rewards import RewardError, Verdict, register, resolve
from megatron_srpo.rewards.registry import FEEDBACK_LIMIT, PREDICTION_LIMIT, as_verdict

OWN = """
import helper_beside_the_judge
def judge(response, answer, metadata):
    return helper_beside_the_judge.VALUE
def two(text, gold): return 1
async def later(response, answer, metadata): return 1
value = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "judge.py").write_text(OWN)
    (tmp_path / "helper_beside_the_judge.py").write_text("VALUE = 0.75")
    (tmp_path / "broken.py").write_text("x = 1\n\nraise KeyError('no such thing')")
    return tmp_path


def test_a_users_function_comes_from_a_file_with_what_lies_beside_it(own):
    assert resolve("mine", {"mine": f"{own}/judge.py:judge"})("r", "a", {}) == 0.75


def test_a_users_function_comes_from_a_module_and_goes_before_a_built_in_one(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own))
    assert resolve("mcq", {"mcq": "judge:judge"})("r", "a", {}) == 0.75
    sys.modules.pop("judge")


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("judge", 'expected "module:function"'),
        (":judge", 'expected "module:function"'),
        ("no_such_module_here:f", "cannot import 'no_such_module_here': ModuleNotFoundError"),
        ("{own}/absent.py:f", "not found"),
        ("{own}/broken.py:f", r"KeyError: 'no such thing' \(broken.py, line 3\)"),
        ("{own}/judge.py:jugde", "Did you mean 'judge'"),
        ("{own}/judge.py:value", "no function 'value'"),
        ("{own}/judge.py:two", r"takes \(text, gold\); expected function\(response, answer, metadata\)"),
        ("{own}/judge.py:later", "async"),
    ],
)
def test_a_wrong_reference_says_what_was_expected(own, reference, complaint):
    with pytest.raises(RewardError, match=complaint):
        resolve("mine", {"mine": reference.format(own=own)})


FOREIGN = """
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": True, "pred": solution_str,
            "feedback": f"{data_source} {extra_info}"}
def verl_short(solution_str, ground_truth, method="strict", **kwargs): return solution_str == ground_truth
def swapped(answer, response): return response == answer
def trl(completions, solution, level, **kwargs):
    return [float(c == s) + l for c, s, l in zip(completions, solution, level)]
def trl_prompts(prompts, completions, **kwargs): return [1.0]
def trl_none(completions, **kwargs): return [None]
def trl_two(completions, **kwargs): return [1.0, 1.0]
def openrlhf(queries, prompts, labels): return 0.0
def slime(args, sample, **kwargs): return 0.0
def verifiers(prompt, completion, answer): return 0.0
def wrong_place(gold, response, metadata): return 0.0
def ours(text, gold, row): return text == gold
"""


@pytest.fixture
def foreign(tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    return lambda name: resolve("mine", {"mine": f"{tmp_path}/foreign.py:{name}"})


def test_functions_written_for_verl_and_trl_get_every_argument_by_its_name(foreign):
    row = {"level": 2, "extra_info": {"index": 7}, "data_source": "gsm8k"}
    found = as_verdict(foreign("verl")("42", "42", row))
    assert found == Verdict(1.0, "gsm8k {'index': 7}", None, "42")
    assert as_verdict(foreign("verl")("41", "42", {"level": 2})) == Verdict(0.0, "mine {'level': 2}", None, "41")
    assert as_verdict(foreign("trl")("42", "42", row)).score == 3.0
    assert as_verdict(foreign("trl")("42", "42", {**row, "solution": "41"})).score == 2.0  # the row has its own
    for name in ("verl_short", "swapped", "ours"):
        assert foreign(name)("42", "42", row) and not foreign(name)("41", "42", row)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("trl_prompts", "asks for 'prompts'.* copy the prompt into another field"),
        ("openrlhf", r"takes \(queries, prompts, labels\), whose parameter 'queries' would be given the response"),
        ("slime", r"takes \(args, sample, \*\*kwargs\); expected function"),
        ("verifiers", "whose parameter 'prompt' would be given the response"),
        ("wrong_place", "whose parameter 'response' would be given the answer"),
    ],
)
def test_a_signature_that_would_be_given_the_wrong_arguments_is_refused(foreign, name, complaint):
    with pytest.raises(RewardError, match=complaint):
        foreign(name)


def test_a_function_of_trl_must_find_its_columns_and_give_one_score(foreign):
    with pytest.raises(ValueError, match="no field 'level'"):
        foreign("trl")("42", "42", {})
    with pytest.raises(ValueError, match="expected one score for one completion, got 2"):
        foreign("trl_two")("42", "42", {})
    with pytest.raises(RewardError, match="expected a number as score"):
        as_verdict(foreign("trl_none")("42", "42", {}))
    with pytest.raises(RewardError, match="expected 'score' in the dict from the reward function, got"):
        as_verdict({"acc": 1.0})


def test_an_unknown_kind_suggests_the_nearest():
    with pytest.raises(RewardError, match=r"'tool-use'. Did you mean 'tooluse'\? Known: exact, math, mcq, mine, "):
        resolve("tool-use", {"mine": "a:b"})


@pytest.mark.parametrize("kind", ["pool", "registry", "os.path", "../mcq", ""])
def test_only_kinds_are_imported_by_name(kind):
    with pytest.raises(RewardError, match="unknown reward kind"):
        resolve(kind)


def test_a_kind_is_registered_once():
    resolve("mcq")
    with pytest.raises(RewardError, match="registered twice"):
        register("mcq")(lambda response, answer, metadata: 1.0)


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (1, Verdict(1.0)),
        (True, Verdict(1.0)),
        (np.float32(0.5), Verdict(0.5)),
        (np.bool_(False), Verdict(0.0)),
        ((0.5,), Verdict(0.5)),
        ((0.5, "why"), Verdict(0.5, "why")),
        ((0.5, None, 1), Verdict(0.5, None, True)),
        ((0.5, None, None, 7), Verdict(0.5, None, None, "7")),
        ((0.5, None, None, "x" * 100_000), Verdict(0.5, None, None, "x" * PREDICTION_LIMIT)),
        (Verdict(0.0, "", False), Verdict(0.0, None, False)),
        (SimpleNamespace(score=0.25, feedback="f", well_formed=None, error=None), Verdict(0.25, "f")),
        ((0.0, "x" * 100_000), Verdict(0.0, "x" * FEEDBACK_LIMIT)),
    ],
)
def test_every_form_of_result_is_one_verdict(result, verdict):
    normalised = as_verdict(result)
    assert normalised == verdict and type(normalised.score) is float


@pytest.mark.parametrize(
    "result", [None, "1", float("nan"), float("inf"), -np.inf, (), (1, 2), (1, "a", True, "3", 4), [1, 2], {}, 10**400]
)
def test_what_is_no_reward_is_refused(result):
    with pytest.raises(RewardError, match="reward function"):
        as_verdict(result)
