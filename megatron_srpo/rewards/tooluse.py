"""The kind tooluse: the response must make the expected calls, as `Action: name` and `Action Input: {json}`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_srpo.core.text import after_thinking
from megatron_srpo.rewards.registry import RewardError, Verdict, register

MARK_LIMIT = 512  # actions and inputs of one response
DEPTH_LIMIT = 64  # of an input's JSON
NAMED_LIMIT = 8  # names that a feedback lists

_MARK = re.compile(r"\bAction( Input)?:")
_BLANK = re.compile(r"\s*")
_LINE = re.compile(r"[^\r\n]*")
_CONTINUES = "{}[],:\"'"  # if one of these follows an object on its line, the object was not the whole input


@dataclass
class Calls:
    """The calls of a response."""

    actions: list[str] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # a sentence for each input that cannot be read

    @property
    def merged(self) -> dict[str, Any]:
        """All inputs in one object. If a name occurs twice, the later value counts, as in the reference."""
        return {name: value for one in self.inputs for name, value in one.items()}

    def values(self, name: str) -> list[Any]:
        """The values of one input name in all calls."""
        return [one[name] for one in self.inputs if name in one]


@register("tooluse")
def score(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    """1 if the multiset of actions and the merged inputs equal the expected ones, and every input is an object; else 0.
    Beyond the reference, the values of an input name in all calls must be the expected ones, so that a later call does
    not hide a wrong value.

    `answer`: [{"Action": name, "Action_Input": object or its JSON}, …], or that list as JSON. Calls inside a closed
    `<think>…</think>` are drafts and do not count. The feedback names what is wrong and never the expected values.
    """
    expected = expected_calls(answer)
    calls = read_calls(after_thinking(response))
    well_formed = bool(calls.actions) and len(calls.actions) == len(calls.inputs) and not calls.problems
    complaints = list(calls.problems) or [
        *_compare_actions(calls.actions, expected.actions), *_compare_inputs(calls, expected)
    ]  # fmt: skip
    if not calls.actions and expected.actions:
        complaints.insert(0, "The response calls no action.")
    return Verdict(0.0 if complaints else 1.0, " ".join(complaints) or None, well_formed, _prediction(calls))


def read_calls(text: str) -> Calls:
    """The calls of a text. Each input is read as one JSON value, so that braces and "Action:" inside its strings do not
    count as calls. An input that is broken, or that continues after its closing brace, is reported as a problem."""
    calls, position, marks = Calls(), 0, 0
    while (mark := _MARK.search(text, position)) is not None:
        marks += 1
        if marks > MARK_LIMIT:  # broken inputs count too, because each costs a pass over the whole text
            calls.problems.append(f"The response makes more than {MARK_LIMIT // 2} calls.")
            break
        if mark.group(1) is None:
            start = _skip_blank(text, mark.end())  # the name may be on the next line
            name = "" if _MARK.match(text, start) else _line(text, start).partition("Action Input:")[0]
            calls.actions.append(name.strip())
            position = start + len(name)
        else:
            position = _read_input(text, mark.end(), calls)
    return calls


def expected_calls(answer: object) -> Calls:
    """The calls of a row's answer. RewardError if the answer does not have the form that `score` describes."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"kind 'tooluse' expects a JSON list of calls as answer: {error}") from None
    if not isinstance(answer, list):
        raise RewardError(f"kind 'tooluse' expects a list of calls as answer, got {type(answer).__name__}")
    calls = Calls()
    for one in answer:
        if not isinstance(one, dict) or not isinstance(one.get("Action"), str):
            raise RewardError('kind \'tooluse\' expects calls {"Action": name, "Action_Input": …} as answer')
        calls.actions.append(one["Action"].strip())
        given = one.get("Action_Input", {})
        try:
            given = _decode(given, 0)[0] if isinstance(given, str) else given
        except ValueError as error:
            raise RewardError(f"kind 'tooluse': the answer's Action_Input is no JSON object: {error}") from None
        if not isinstance(given, dict):
            raise RewardError(f"kind 'tooluse': the answer's Action_Input is a {type(given).__name__}, not an object")
        calls.inputs.append(given)
    return calls


def _line(text: str, position: int) -> str:
    """The rest of the line from `position` on."""
    match = _LINE.match(text, position)
    assert match is not None  # the pattern matches nothing, too
    return match.group()


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _read_input(text: str, position: int, calls: Calls) -> int:
    """Read the input that starts after `position`; returns the position at which to continue."""
    start = _skip_blank(text, position)
    number = len(calls.inputs) + len(calls.problems) + 1
    if text[start : start + 1] != "{":
        calls.problems.append(f"Action Input {number} is not a JSON object.")
        return position
    try:
        value, end = _decode(text, start)
    except ValueError as error:
        calls.problems.append(f"Action Input {number} is not valid JSON: {_reason(error)}.")
        return start + 1
    rest = _line(text, end).lstrip()
    if rest[:1] and rest[0] in _CONTINUES:
        calls.problems.append(f"Action Input {number} goes on behind its closing brace.")
        return end
    calls.inputs.append(value)
    return end


def _decode(text: str, start: int) -> tuple[Any, int]:
    """(value, end) of the JSON value at `start`. ValueError if it is no JSON, contains NaN or is nested too deeply."""
    try:
        value, end = _DECODER.raw_decode(text, _skip_blank(text, start))
        if _depth(value) > DEPTH_LIMIT:
            raise RecursionError
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, end


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _depth(value: object) -> int:
    """How deeply lists and objects are nested. It goes level by level, so that no depth can exhaust the stack."""
    depth, level = 0, [value]
    while level and depth <= DEPTH_LIMIT:
        inner: list[object] = []
        for one in level:
            inner.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        depth, level = depth + 1, inner
    return depth


def _reason(error: ValueError) -> str:
    return error.msg.lower() if isinstance(error, json.JSONDecodeError) else str(error)[:80]


def _same(one: object, other: object) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same number, and true is not 1 (in Python it is)."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _compare_actions(given: list[str], expected: list[str]) -> list[str]:
    surplus, missing = Counter(given) - Counter(expected), Counter(expected) - Counter(given)
    complaints = []
    if surplus:
        complaints.append(f"Wrong or superfluous actions: {_named(surplus)}.")
    if missing:
        complaints.append(f"Expected actions that are missing: {missing.total()}.")
    return complaints


def _compare_inputs(given: Calls, expected: Calls) -> list[str]:
    ours, theirs = given.merged, expected.merged
    wrong = [
        name
        for name in theirs
        if name in ours
        and not (_same(ours[name], theirs[name]) and _same_values(given.values(name), expected.values(name)))
    ]
    problems = {
        "Unknown input names": [name for name in ours if name not in theirs],
        "Missing input names": [name for name in theirs if name not in ours],
        "Inputs with a wrong value": wrong,
    }
    return [f"{what}: {_named(names)}." for what, names in problems.items() if names]


def _same_values(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether each value of one list is in the other."""
    return all(any(_same(a, b) for b in others) for a in some) and all(any(_same(a, b) for a in some) for b in others)


def _prediction(calls: Calls) -> str:
    """A text that is equal for responses that `score` takes for the same answer."""
    several: dict[str, list[str]] = {}  # input names with more than one value
    for one in calls.inputs:
        for name, value in one.items():
            several.setdefault(name, []).append(json.dumps(_canonical(value), sort_keys=True))
    several = {name: sorted(set(values)) for name, values in several.items() if len(set(values)) > 1}
    parts = [sorted(calls.actions), _canonical(calls.merged), *([several] if several else [])]
    return json.dumps(parts, sort_keys=True)


def _canonical(value: object) -> object:
    """The value with whole numbers as integers: equal values become equal texts."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    return [_canonical(part) for part in value] if isinstance(value, list) else value


def _named(names: Collection[str]) -> str:
    shown = [repr(name[:80]) for name in list(names)[:NAMED_LIMIT]]
    return ", ".join(shown) + (", …" if len(names) > NAMED_LIMIT else "")
