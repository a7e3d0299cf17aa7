"""Keeps reasoning-gym's scorers from running what a model wrote.

Some of them read the answer with Python's `eval`, others with sympy's `parse_expr`, which evaluates too. The first get
a reader of literals in its place; for the others an answer must be plain arithmetic before they see it.
"""

from __future__ import annotations

import ast
import importlib
import re

EVALUATING = {  # data set: its module
    "binary_matrix": "algorithmic.binary_matrix",
    "n_queens": "games.n_queens",
    "spiral_matrix": "algorithmic.spiral_matrix",
    "string_insertion": "algorithmic.string_insertion",
}
PARSING = {
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


def disarm(dataset: str) -> None:
    """Give the data set's module a reader of literals where it would call `eval`; others stay as they are."""
    if dataset in EVALUATING:
        importlib.import_module(f"reasoning_gym.{EVALUATING[dataset]}").eval = ast.literal_eval


def is_safe(dataset: str, answer: str) -> bool:
    """Whether the data set's scorer may see `answer`."""
    return dataset not in PARSING or is_arithmetic(answer)


def is_arithmetic(text: str) -> bool:
    """Numbers, + - * / ^ ** and brackets, one-letter variables and the usual functions: nothing that could be called or
    reached otherwise. Linear in the length."""
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
