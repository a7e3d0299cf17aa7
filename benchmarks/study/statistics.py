"""Student's paired t-test and Holm's correction, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| ≥ |t|) for Student's T with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2 == 0:
        for k in range(0, freedom - 1, 2):
            total += term
            term *= (k + 1) / (k + 2) * cosine**2
        return 1.0 - math.sin(angle) * total
    term = cosine
    for k in range(1, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine**2
    return 1.0 - 2 / math.pi * (angle + math.sin(angle) * total)


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the mean difference; NaN for fewer than two pairs."""
    n = len(differences)
    if n < 2:
        return math.nan
    mean = math.fsum(differences) / n
    variance = math.fsum((value - mean) ** 2 for value in differences) / (n - 1)
    if variance == 0:
        return 0.0 if mean else 1.0
    return two_sided_p(mean / math.sqrt(variance / n), n - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given. NaN stays NaN, and does not count as a comparison."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
