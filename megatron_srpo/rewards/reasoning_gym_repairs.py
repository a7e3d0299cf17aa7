"""Corrects scorers of reasoning-gym that reward wrong answers or miss right ones.

Each repair is for a data set whose scorer in the library has the fault that its comment names. A scorer that the
library corrects is not changed by its repair.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

Entry = dict[str, Any]

_OPERATORS: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip


def readable(dataset: str, entry: Entry) -> Entry:
    """The entry as the scorer compares it. JSON has lists where the library generated tuples, and (1, 2) != [1, 2]."""
    if dataset in ("arc_agi", "rearc"):
        board = entry["metadata"]["output"]
        return {**entry, "metadata": {**entry["metadata"], "output": tuple(map(tuple, board))}}
    return entry


def is_wrong(dataset: str, answer: str, entry: Entry) -> bool:
    """Whether the scorer would give credit for the answer although it is wrong."""
    if dataset in _WRONG:
        return _WRONG[dataset](answer, entry)
    inherits = DATASETS[dataset][0].score_answer is ProceduralDataset.score_answer
    return inherits and not _stands_alone(str(entry["answer"]), answer)


def _stands_alone(right: str, answer: str) -> bool:
    """The library gives half the reward for 12 where 1 is right, because "12" contains "1"."""
    return re.search(rf"(?<![\w.+-]){re.escape(right)}(?!\w|\.\d)", answer) is not None or right == answer


def _is_no_number(answer: str, entry: Entry) -> bool:
    """complex_arithmetic: the distance to NaN is NaN, and the smaller one of 1 and NaN is 1."""
    return "n" in answer.casefold()


def _is_another_text(answer: str, entry: Entry) -> bool:
    """game_of_life_halting: bool("False") is true, like that of every text, so that any answer was right."""
    return answer.strip(" .").casefold() != str(entry["answer"]).casefold()


def _is_another_probability(answer: str, entry: Entry) -> bool:
    """coin_flip: every prefix of the right number, such as 0, had the whole reward."""
    given, right = (Fraction(text.replace(",", "")) for text in (answer, entry["answer"]))
    return abs(given - right) > 1e-4


def _uses_other_numbers(answer: str, entry: Entry) -> bool:
    """countdown, puzzle24: x/x is a number for free, 1.5 is the 1 and the 5, and puzzle24 takes any four numbers."""
    if not re.fullmatch(r"[\d\s+\-*/()]*", answer, re.ASCII) or re.search(r"\*\s*\*|/\s*/", answer):
        return True
    return Counter(map(int, re.findall(r"\d+", answer))) != Counter(entry["metadata"]["numbers"])


def _is_not_24(answer: str, entry: Entry) -> bool:
    """puzzle24: 24.5 was rounded to 24."""
    return _uses_other_numbers(answer, entry) or _value(ast.parse(answer.strip(), mode="eval").body) != 24


def _value(node: ast.expr) -> Fraction:
    """The exact value of an expression of integers with + - * /, which the library has already read."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    return Fraction(ast.literal_eval(node))


_WRONG: dict[str, Callable[[str, Entry], bool]] = {
    "coin_flip": _is_another_probability,
    "complex_arithmetic": _is_no_number,
    "countdown": _uses_other_numbers,
    "game_of_life_halting": _is_another_text,
    "puzzle24": _is_not_24,
}
