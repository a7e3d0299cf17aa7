"""Finds the reward function of a kind of row.

A reward function is `(response: str, answer, metadata: dict) -> float | tuple | dict | Verdict | Reward`. A built-in
kind is the name of a file in this folder whose function has the decorator `@register(kind)`. The user's own functions
are given as "module:function" or "path/file.py:function", and may have verl's or TRL's signature (signatures.py).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import clause
from megatron_srpo.core.user_code import load_file
from megatron_srpo.rewards.signatures import RewardFunction, UnknownSignature, adapted

FEEDBACK_LIMIT = 8192  # characters; the teacher reads the feedback, and its prompt has a limit too
PREDICTION_LIMIT = 1000  # characters
PREDICTION_IS_ANSWER = {"math"}  # kinds that can score a response against another response's prediction
LARGEST_SCORE = 1e12  # larger ones overflow in the sums and squares of fp32, which would spoil the whole batch
# Other files of this folder.
_NOT_KINDS = {
    "answers", "equality", "made_up", "pool", "process", "reasoning_gym_repairs", "reasoning_gym_safety", "registry",
    "signatures", "tags", "worker",
}  # fmt: skip
_FUNCTIONS: dict[str, RewardFunction] = {}


class RewardError(UserError):
    """A kind that cannot be scored: unknown, not importable, or a function that returns no reward."""


class Verdict(NamedTuple):
    """What a reward function returns: the fields of records.Reward, without importing torch."""

    score: float
    feedback: str | None = None  # what is wrong with the response, in words that may be shown to the teacher
    well_formed: bool | None = None  # whether the response ends in the required format; None if the kind has no format
    prediction: str | None = None  # the answer that was read from the response; None stands for the whole response


def register(kind: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: the function scores rows of `kind`."""

    def keep(function: RewardFunction) -> RewardFunction:
        known = _FUNCTIONS.get(kind)
        if known is not None and known.__module__ != function.__module__:
            raise RewardError(f"reward kind {kind!r} is registered twice: {known.__module__}, {function.__module__}")
        _FUNCTIONS[kind] = function
        return function

    return keep


def known_kinds() -> list[str]:
    """The built-in kinds and those registered so far."""
    files = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])} - _NOT_KINDS
    return sorted(files | set(_FUNCTIONS))


def resolve(kind: str, functions: dict[str, str] | None = None) -> RewardFunction:
    """The function that scores `kind`. An entry of `functions` (kind → reference) overrides a built-in kind.

    "reasoning-gym" and "reasoning_gym" are the same kind. RewardError if there is no such function, with the cure.
    """
    if functions and kind in functions:
        return _by_reference(kind, functions[kind])
    name = kind.replace("-", "_")
    if kind not in _FUNCTIONS and name in known_kinds() and name not in _FUNCTIONS:
        _import_built_in(name)
    function = _FUNCTIONS.get(kind) or _FUNCTIONS.get(name)
    if function is None:
        raise RewardError(_unknown(kind, functions or {}))
    return function


def as_verdict(result: object) -> Verdict:
    """A reward function's result as a Verdict: a number, a tuple or an object with the fields of Verdict, or a dict
    with `score`, as verl's functions return it. RewardError if it is no reward, or its score is not finite."""
    if isinstance(result, Mapping):
        if "score" not in result:
            raise RewardError(f"expected 'score' in the dict from the reward function, got {sorted(map(str, result))}")
        found = {"prediction": result.get("pred"), **result}  # verl's name
        parts = [found.get(name) for name in Verdict._fields]
    elif isinstance(result, tuple):
        parts = list(result)
    elif hasattr(result, "score"):
        parts = [getattr(result, name, None) for name in Verdict._fields]
    else:
        parts = [result]
    if not 1 <= len(parts) <= len(Verdict._fields):
        raise RewardError(f"expected ({', '.join(Verdict._fields)}) from the reward function, got {len(parts)} values")
    score, feedback, well_formed, prediction = parts + [None] * (len(Verdict._fields) - len(parts))
    if feedback is not None and not isinstance(feedback, str):
        raise RewardError(f"expected text as feedback from the reward function, got {type(feedback).__name__}")
    return Verdict(
        _finite(score),
        feedback[:FEEDBACK_LIMIT] if feedback else None,
        None if well_formed is None else bool(well_formed),
        None if prediction is None else str(prediction)[:PREDICTION_LIMIT],
    )


def _finite(score: object) -> float:
    try:
        if isinstance(score, str | bytes | None):
            raise TypeError
        number = float(score)  # type: ignore[arg-type]  # anything with __float__: bool, numpy, one-element tensors
    except (TypeError, ValueError, OverflowError):
        raise RewardError(f"expected a number as score from the reward function, got {type(score).__name__}") from None
    if not math.isfinite(number):
        raise RewardError(f"expected a finite score from the reward function, got {number}")
    if abs(number) > LARGEST_SCORE:
        raise RewardError(f"expected a score of at most {LARGEST_SCORE:g} from the reward function, got {number:g}")
    return number


def _import_built_in(name: str) -> None:
    try:
        importlib.import_module(f"megatron_srpo.rewards.{name}")
    except ImportError as error:
        package = (error.name or name).replace("_", "-")
        raise RewardError(
            f"reward kind {name!r} needs a package: {clause(error)}. Install it: pip install {package}"
        ) from error


def unknown(kind: str, functions: dict[str, str]) -> str | None:
    """The message for an unknown kind; None if the kind is known. Imports nothing."""
    if kind in functions or kind in _FUNCTIONS or kind.replace("-", "_") in known_kinds():
        return None
    return _unknown(kind, functions)


def _unknown(kind: str, functions: dict[str, str]) -> str:
    known = sorted(set(known_kinds()) | set(functions))
    nearest = difflib.get_close_matches(kind.replace("-", "_"), known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return (
        f"unknown reward kind {kind!r}.{hint} Known: {', '.join(known)}. "
        f'For your own: [reward.functions] {kind} = "module:function" or "path/file.py:function".'
    )


def _by_reference(kind: str, reference: str) -> RewardFunction:
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise RewardError(
            f'reward.functions.{kind}: expected "module:function" or "path/file.py:function", got {reference!r}'
        )
    try:
        module = load_file(Path(where), error=RewardError) if where.endswith(".py") else importlib.import_module(where)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise RewardError(f"reward.functions.{kind}: cannot import {where!r}: {_last_frame(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise RewardError(f"reward.functions.{kind}: {where!r} has no function {name!r}.{hint}")
    try:
        return adapted(kind, function)
    except UnknownSignature as problem:
        raise RewardError(f"reward.functions.{kind}: {reference!r} {problem}") from None


def _last_frame(error: BaseException) -> str:
    """The error and its line, without a traceback: "KeyError: 'x' (judge.py, line 3)"."""
    place, frame = "", error.__traceback__
    while frame is not None:
        file = Path(frame.tb_frame.f_code.co_filename)
        if file != Path(__file__) and file.suffix == ".py" and "importlib" not in file.parts:
            place = f" ({file.name}, line {frame.tb_lineno})"
        frame = frame.tb_next
    return f"{type(error).__name__}: {error}{place}"
