"""Keeps reasoning-gym's scorers from executing code that a model wrote.

Some scorers read the answer with Python's `eval`, others with sympy's `parse_expr`, which evaluates too. In the first,
`eval` is replaced by a reader of literals. The others get an answer only if it is plain arithmetic.
"""

from __future__ import annotations

import ast
import importlib
import re

EVALUATING = {  # data sets whose scorer calls `eval`, and their module
    "binary_matrix": "algorithmic.binary_matrix",
    "n_queens": "games.n_queens",
    "spiral_matrix": "algorithmic.spiral_matrix",
    "string_insertion": "algorithmic.string_insertion",
}
PARSING = {  # data sets whose scorer calls `parse_expr`, and their module
    "countdown": "games.countdown",
    "intermediate_integration": "algebra.intermediate_integration",
    "polynomial_multiplication": "algebra.polynomial_multiplication",
    "puzzle24": "games.puzzle24",
    "simple_integration": "algebra.simple_integration",
}
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "Integral", "pi",
}  # fmt: skip

_TOKEN = re.compile(r"\s*(?:([A-Za-z]+)|[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\*\*|[-+*/^(),])", re.ASCII)


def replace_eval(dataset: str) -> None:
    """If the data set's scorer calls `eval`, let it call `ast.literal_eval` instead."""
    if dataset in EVALUATING:
        vars(importlib.import_module(f"reasoning_gym.{EVALUATING[dataset]}"))["eval"] = ast.literal_eval


def is_safe(dataset: str, answer: str) -> bool:
    """Whether the data set's scorer may read `answer`."""
    return dataset not in PARSING or is_arithmetic(answer)


def is_arithmetic(text: str) -> bool:
    """Whether `text` has nothing but numbers, + - * / ^ ** and brackets, one-letter variables and the usual functions.
    Takes time linear in the length."""
    position, text = 0, text.rstrip()
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return False
        name = token.group(1)
        if name is not None and len(name) > 1 and name not in FUNCTIONS:
            return False
        position = token.end()
    return True
