"""Tools of the Qwen3-8B example: a calculator, and Python for what it cannot do. Replace them with your own."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable

from megatron_srpo.environments import sandbox
from megatron_srpo.environments.sandbox import Limits

OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg,
}  # fmt: skip
LARGEST = 1e100


def calculate(expression: str) -> str:
    """Computes an arithmetic expression of numbers, + - * / // % and brackets, for example "(17 + 3) * 2.5"."""
    return f"{_value(ast.parse(expression[:1000], mode='eval').body):.12g}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value: float = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    else:
        raise ValueError("expected numbers, + - * / // % and brackets")
    if abs(value) > LARGEST:
        raise ValueError("the number is too large")
    return value


async def run_python(code: str, expression: str) -> str:
    """Runs Python code in a sandbox without network, and returns the JSON of an expression's value."""
    calls = [{"how": "value", "text": expression}]
    isolation = sandbox.choose("auto")
    outcome = await sandbox.run(code, calls=calls, limits=Limits(), isolation=isolation)
    last = outcome.facts[-1] if outcome.facts else {}
    if "value" not in last:  # what a tool raises is told to the model and is feedback
        raise RuntimeError(last.get("error") or last.get("failed") or outcome.ended or "the program has ended before")
    return json.dumps(last["value"])
