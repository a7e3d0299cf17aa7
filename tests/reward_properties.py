"""What holds for the rewards' parsers whatever a model writes; run by Hypothesis and by atheris.

The references here are written in another way than the parsers: characters one by one, no regular expressions.
"""

from __future__ import annotations

import json

from megatron_srpo.core.text import after_thinking
from megatron_srpo.rewards import resolve
from megatron_srpo.rewards.tags import BOXED_LIMIT, last_boxed, last_tagged
from megatron_srpo.rewards.tooluse import DEPTH_LIMIT, read_calls

PIECES = (
    "<answer>", "</answer>", "<answer", "</answer", "<ANSWER>", "<think>", "</think>", "Action:", "Action Input:",
    "Action: search", 'Action Input: {"q": "x"}', '{"a": ', "{", "}", "[", "]", '"', "'", ":", ",",
    "\\boxed{", "\\fbox {", "\\boxed", "\\{", "\\", "\0", "\ud83d\ude00", "\ud800", "\udfff", "\u202e", "\u2066",
    "\ufeff", "\n", "\r\n", " ", "NaN", "Infinity", "1e999", "-0", "true", "null", "\\u0000", "\\ud800",
    "A", "B", "42", "4" * 400,
)  # fmt: skip
CALLS = [{"Action": "search", "Action_Input": {"q": "a } b", "n": 1}}, {"Action": "stop", "Action_Input": {}}]

mcq, exact, mathematics, tooluse = map(resolve, ("mcq", "exact", "math", "tooluse"))


def check_all(text: str) -> None:
    """Every property of one text."""
    check_tags(text)
    check_boxed(text)
    check_mcq(text)
    check_exact(text)
    check_calls(text)


def check_tags(text: str) -> None:
    """`last_tagged` is what a reader from the left finds."""
    opening, closing, found = "<answer>", "</answer>", None
    for start in range(len(text)):
        if text[start : start + len(opening)] == opening:
            inside = text[start + len(opening) :]
            end = inside.find(closing)
            found = None if end < 0 else inside[:end].strip()
    assert last_tagged(text, "answer") == found
    assert "</think>" not in after_thinking(text) and text.endswith(after_thinking(text))


def check_boxed(text: str) -> None:
    """What is found is balanced (or over the limit), stands behind the mark, and no later box is whole."""
    found = last_boxed(text)
    if found is None or len(found) > BOXED_LIMIT:
        return
    depth, escaped = 0, False
    for character in found:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        else:
            depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0 and not escaped and "{" + found + "}" in text


def check_mcq(text: str) -> None:
    verdict = mcq(text, "B", {})
    assert verdict.score == float(last_tagged(after_thinking(text), "answer") == "B")
    assert verdict.well_formed is False or text.rstrip().endswith("</answer>")
    assert mcq(text + "</think><answer>B</answer>", "B", {})[:3] == (1.0, None, True)
    assert mcq(text + "<answer>A</answer>", "B", {}).score == 0.0


def check_exact(text: str) -> None:
    assert exact(text, "B", {}).score == float(text.strip() == "B")


def check_calls(text: str) -> None:
    """Any text is read; the expected calls behind it count exactly if the text itself calls nothing."""
    calls = read_calls(text)
    assert all(isinstance(given, dict) for given in calls.inputs)
    assert all(depth_of(given) <= DEPTH_LIMIT for given in calls.inputs)
    json.dumps(calls.inputs, allow_nan=False) if "e999" not in text else None
    right = "".join(f"\nAction: {c['Action']}\nAction Input: {json.dumps(c['Action_Input'])}" for c in CALLS)
    silent = "Action" not in text and "think>" not in text
    verdict = tooluse(text + right, CALLS, {})
    if silent:
        assert verdict.score == 1.0
    assert tooluse(text + "</think>" + right, CALLS, {}).score == 1.0
    assert tooluse(text + "</think>" + right + "\nAction: more", CALLS, {}).score == 0.0
    wrong = right.replace('"n": 1', '"n": 2')
    assert tooluse(text + "</think>" + wrong, CALLS, {}).score == 0.0


def depth_of(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth_of, inner), default=0) if isinstance(value, dict | list) else 0
