"""Kinds are found by name or reference, mistakes are explained, and results have one form."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_srpo.rewards import RewardError, Verdict, register, resolve
from megatron_srpo.rewards.registry import FEEDBACK_LIMIT, as_verdict

OWN = """
import helper_beside_the_judge
def judge(response, answer, metadata):
    return helper_beside_the_judge.VALUE
def two(response, answer): return 1
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
        ("{own}/judge.py:two", r"function\(response, answer, metadata\)"),
        ("{own}/judge.py:later", "async"),
    ],
)
def test_a_wrong_reference_says_what_was_expected(own, reference, complaint):
    with pytest.raises(RewardError, match=complaint):
        resolve("mine", {"mine": reference.format(own=own)})


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
