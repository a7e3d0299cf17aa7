"""Reward parsers on whatever a model may write: no crash, no hang, no wrong score."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import reward_properties as properties

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000
HANG_SECONDS = 60  # that no linear parser needs for a megabyte, on any machine

pieces = st.sampled_from(properties.PIECES)
anything = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
texts = st.lists(pieces | anything, max_size=30).map("".join)
sums = st.text("0123456789+-*/(){}.,= xyπ\\$%&_frac", max_size=30)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_every_property_holds_for_whatever_is_written(text):
    properties.check_all(text)


@settings(max_examples=40, deadline=None)
@given(sums)
def test_the_boxed_answer_is_right_whatever_was_boxed_before_and_wrong_if_it_is_another(text):
    before = f"\\boxed{{{text}}} "
    assert properties.mathematics(before + "\\boxed{42}", "42", {}).score == 1.0
    assert properties.mathematics(before + "\\boxed{41}", "42", {}).score == 0.0
    assert properties.mathematics(f"\\boxed{{{text}}}", "\\text{no such answer}", {}).score == 0.0


LONG = {
    "unclosed tags": "<answer>" * (MEGABYTE // 8),
    "closed tags": "<answer>x</answer>" * (MEGABYTE // 18),
    "one long answer": "<answer>" + "x" * MEGABYTE + "</answer>",
    "open braces": "\\boxed{" * (MEGABYTE // 7),
    "nested braces": "\\boxed" + "{" * MEGABYTE + "}" * MEGABYTE,
    "broken inputs": "Action Input: {" * (MEGABYTE // 15),
    "nested lists": "Action: a\nAction Input: {" + '"a":[' * (MEGABYTE // 5),
    "deep objects": "Action: a\nAction Input: " + '{"a":' * (MEGABYTE // 5) + "1" + "}" * (MEGABYTE // 5),
    "actions": "Action:" * (MEGABYTE // 7),
    "white space": "Action Input:" + " " * MEGABYTE + "{",
    "backslashes": "\\boxed{" + "\\" * MEGABYTE,
    "NUL": "\0" * MEGABYTE + "<answer>\0",
    "right to left": "\u202e" * MEGABYTE,
    "thinking": "<think>" * (MEGABYTE // 7),
    "a long number": "\\boxed{" + "9" * MEGABYTE + "}",
}


@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_of_anything_is_scored_in_linear_time(kind):
    """A quadratic parser would need 10¹² steps."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(HANG_SECONDS)
    try:
        for reward, answer in (("mcq", "B"), ("exact", "B"), ("mathematics", "42"), ("tooluse", properties.CALLS)):
            assert getattr(properties, reward)(LONG[kind], answer, {}).score == 0.0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts)
def test_every_property_holds_for_many_texts(text):
    properties.check_all(text)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(sums)
def test_boxed_answers_hold_for_many_texts(text):
    assert properties.mathematics(f"\\boxed{{{text}}} \\boxed{{42}}", "42", {}).score == 1.0
    assert properties.mathematics(f"\\boxed{{{text}}} \\boxed{{41}}", "42", {}).score == 0.0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install atheris==3.0.0")
def test_every_property_holds_for_what_coverage_guided_fuzzing_finds():
    result = subprocess.run(
        [sys.executable, "tools/fuzz_rewards.py", "-runs=20000", "-max_len=400", "-seed=1"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
