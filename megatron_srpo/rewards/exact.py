"""The kind exact: the whole response must be the answer. White space around it does not count."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_srpo.rewards.answers import exact_reference
from megatron_srpo.rewards.registry import Verdict, register


@register("exact")
def score(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    """1 if the stripped response equals the answer (text, or a number as Python writes it), else 0."""
    given = response.strip()
    if given == exact_reference(answer):
        return Verdict(1.0)
    return Verdict(0.0, f"The answer {_shown(given)} is not correct." if given else "The response is empty.")


def _shown(text: str, limit: int = 200) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
