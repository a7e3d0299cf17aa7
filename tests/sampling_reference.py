"""What samples are to be distributed as, in float64, and whether they are."""

from __future__ import annotations

import math

import torch


def kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The probabilities [vocabulary] to sample from, in float64: a second formulation of what vLLM does."""
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    order = probs.argsort(descending=True)
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = probs[order].cumsum(0) - probs[order]  # the mass of the likelier tokens
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean, tokens expected less than 5 times joined."""
    expected = probs * counts.sum()
    rare = expected < 5
    if expected[rare].sum() > 0:
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    else:
        counts, expected = counts[~rare], expected[~rare]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
