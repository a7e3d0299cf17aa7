"""The reward of the calculator example."""

from __future__ import annotations

from collections.abc import Mapping


def last_number(response: str, answer: object, metadata: Mapping[str, object]) -> dict[str, object]:
    """1 if the last turn is the right number. What was wrong with the calls comes from the environment."""
    correct = response.strip() == str(answer)
    return {"score": float(correct), "prediction": response.strip()[:20]}
