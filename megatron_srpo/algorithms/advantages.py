"""Advantages of a group's attempts."""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPSILON = 1e-6


def group_advantages(scores: Sequence[float], *, divide_by_std: bool = False) -> list[float]:
    """A_i = r_i − mean(r), ÷ (s + 1e-6) by choice, with s the sample standard deviation (n − 1). One attempt: 0."""
    mean = math.fsum(scores) / len(scores)
    centred = [score - mean for score in scores]
    if not divide_by_std or len(scores) == 1:
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / (len(scores) - 1))
    return [value / (deviation + STD_EPSILON) for value in centred]


def leave_one_out_advantages(scores: Sequence[float]) -> list[float]:
    """A_i = r_i − mean of the other attempts' rewards (RLOO, arXiv 2402.14740). One attempt: 0."""
    if len(scores) == 1:
        return [0.0]
    total = math.fsum(scores)
    return [score - (total - score) / (len(scores) - 1) for score in scores]
