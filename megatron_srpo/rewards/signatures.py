"""Reward functions that were written for another library: each argument goes to a parameter by its name.

    ours    (response, answer, metadata)
    verl    (data_source, solution_str, ground_truth, extra_info=None)
    TRL     (completions, **columns)

A function whose parameters have other names is called by position. If its names say that the positions mean something
else, it is refused: called by position it would score every response 0, in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any

RewardFunction = Callable[[str, Any, dict[str, Any]], Any]

ORDER = ("response", "answer", "metadata")
MEANINGS = {  # of parameters, by name
    "response": "response",
    "solution_str": "response",
    "completion": "response",
    "answer": "answer",
    "ground_truth": "answer",
    "label": "answer",
    "metadata": "metadata",
    "extra_info": "extra_info",
    "data_source": "data_source",
    "kind": "kind",
}
FOREIGN = {"args", "sample", "samples", "queries", "query", "prompts", "prompt", "labels", "state", "task", "parser"}
ANSWER_COLUMNS = ("answer", "ground_truth", "solution", "label")  # names under which TRL's functions expect it
EXPECTED = (
    "expected function(response, answer, metadata), verl's (data_source, solution_str, ground_truth, extra_info) or "
    "TRL's (completions, **columns)"
)


class UnknownSignature(ValueError):
    """A function that cannot be called; str() says why, and the cure."""


def adapted(kind: str, function: Callable) -> RewardFunction:
    """The reward function of `kind` as (response, answer, metadata) → result. UnknownSignature if it takes others."""
    if inspect.iscoroutinefunction(function):
        raise UnknownSignature(f"is async; {EXPECTED}, and a plain function")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return function  # a builtin without a signature
    names = [parameter.name for parameter in parameters]
    if "completions" in names:
        return _columnwise(function, parameters)
    if _reads_in_our_order(parameters):
        return function
    required = [parameter.name for parameter in parameters if _is_required(parameter)]
    meanings = {MEANINGS[name] for name in required if name in MEANINGS}
    by_name = all(parameter.kind is not Parameter.POSITIONAL_ONLY for parameter in parameters)
    if by_name and "response" in meanings and set(required) <= MEANINGS.keys():
        return _by_name(kind, function, [name for name in names if name in MEANINGS])
    _require_positions(parameters)
    return function


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in (
        Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD,
    )  # fmt: skip


def _positional(parameters: Sequence[Parameter]) -> list[str]:
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _reads_in_our_order(parameters: Sequence[Parameter]) -> bool:
    return tuple(_positional(parameters)[:3]) == ORDER and not any(map(_is_required, parameters[3:]))


def _require_positions(parameters: Sequence[Parameter]) -> None:
    shown = f"takes ({', '.join(str(parameter) for parameter in parameters)})"
    try:
        inspect.Signature(parameters).bind("response", "answer", {})
    except TypeError:
        raise UnknownSignature(f"{shown}; {EXPECTED}") from None
    for position, name in zip(ORDER, _positional(parameters), strict=False):
        meaning = MEANINGS.get(name, position)
        if name in FOREIGN or meaning not in (position, "extra_info" if position == "metadata" else position):
            raise UnknownSignature(
                f"{shown}, whose parameter {name!r} would be given the {position}; {EXPECTED}. Write a function that "
                "takes these and calls yours"
            )


def _by_name(kind: str, function: Callable, names: Sequence[str]) -> RewardFunction:
    def score(response: str, answer: object, metadata: dict[str, Any]) -> Any:
        values = {
            "response": response,
            "answer": answer,
            "metadata": metadata,
            "extra_info": metadata.get("extra_info", metadata),
            "data_source": metadata.get("data_source", kind),
            "kind": kind,
        }
        return function(**{name: values[MEANINGS[name]] for name in names})

    return score


def _columnwise(function: Callable, parameters: Sequence[Parameter]) -> RewardFunction:
    """A function of TRL: it takes lists, which have one response here, and returns a list of scores."""
    required = {parameter.name for parameter in parameters if _is_required(parameter)} - {"completions"}
    if "prompts" in required:
        raise UnknownSignature(
            "asks for 'prompts', which reward functions are not given; copy the prompt into another field of the rows, "
            "for example question, and take that"
        )
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    wanted = {parameter.name for parameter in parameters} - {"completions"}

    def score(response: str, answer: object, metadata: dict[str, Any]) -> Any:
        columns = dict.fromkeys(ANSWER_COLUMNS, answer) | metadata
        missing = sorted(required - columns.keys())
        if missing:
            raise ValueError(f"the row has no field {missing[0]!r}, which the function asks for as a column")
        given = {name: [value] for name, value in columns.items() if takes_all or name in wanted}
        scores = list(function(completions=[response], **given))
        if len(scores) != 1:
            raise ValueError(f"expected one score for one completion, got {len(scores)}")
        return scores[0]

    return score
