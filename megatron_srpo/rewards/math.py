r"""The kind math: the last `\boxed{…}` of the response must equal the answer mathematically."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_srpo.core.text import after_thinking
from megatron_srpo.rewards.answers import math_reference
from megatron_srpo.rewards.equality import equal
from megatron_srpo.rewards.registry import Verdict, register
from megatron_srpo.rewards.tags import BOXED_LIMIT, last_boxed


@register("math")
def score(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    r"""1 if the content of the last `\boxed{…}` equals the answer, else 0. The answer is LaTeX, plain text or a number,
    boxed or not, or a solution that ends in `#### answer`. Thinking is a draft. The text is parsed as LaTeX and never
    evaluated."""
    expected = math_reference(answer)
    given = last_boxed(after_thinking(response))
    if given is None:
        return Verdict(0.0, "The response has no final answer in \\boxed{…}.", False)
    if not given.strip() or len(given) > BOXED_LIMIT:
        return Verdict(0.0, "The content of \\boxed{…} is not an answer.", False)
    if equal(expected, given):
        return Verdict(1.0, None, True, given.strip())
    return Verdict(0.0, f"The answer {given.strip()[:200]} is not correct.", True, given.strip())
