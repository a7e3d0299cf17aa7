"""Results that the SRPO paper (arXiv 2604.02288) reports, to print beside our own. published.toml has the numbers."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

BUDGETS = (1, 5, 10)  # hours on 8 H20
BENCHMARKS = ("chemistry", "physics", "biology", "materials", "tooluse")
MEAN, BASE = "mean", "base"  # of all five benchmarks; the model before training


@functools.cache
def numbers() -> dict[str, Any]:
    """The whole file."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def accuracy(model: str, method: str, hours: int, benchmark: str) -> float | None:
    """The paper's number in percent, if it reports one."""
    return numbers()["accuracy"].get(model, {}).get(method, {}).get(str(hours), {}).get(benchmark)


def step_seconds(model: str, method: str, hours: int) -> float | None:
    """The paper's number, if it reports one."""
    return numbers()["seconds"].get(model, {}).get(method, {}).get(str(hours))
