"""The reward of the task "tally"."""

from __future__ import annotations

from collections.abc import Mapping


def letter(response: str, answer: object, metadata: Mapping[str, object]) -> float:
    """1 if the response ends in `#` and the right letter. What stands before does not count, as in multiple choice."""
    return float(response.count("#") == 1 and response[-2:] == f"#{answer}")
