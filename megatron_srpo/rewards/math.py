r"""The kind math: the last `\boxed{…}` of the response must equal the answer mathematically, as math-verify judges."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import math_verify
from math_verify import LatexExtractionConfig

from megatron_srpo.rewards.registry import RewardError, Verdict, register

BOXED_LIMIT = 2000  # characters; a longer box is no answer, and parsing it could take minutes
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{")

# math-verify's own time-outs use signals, which fail outside the main thread. They are off, because the pool has a
# time-out, and so is the library's warning that they are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@register("math")
def score(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    r"""1 if the content of the last `\boxed{…}` equals the answer, else 0. The answer is LaTeX, plain text or a number,
    boxed or not. The text is parsed as LaTeX and never evaluated."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RewardError(f"kind 'math' expects text or a number as answer, got {type(answer).__name__}")
    given = last_boxed(response)
    if given is None:
        return Verdict(0.0, "The response has no final answer in \\boxed{…}.", False)
    if not given.strip() or len(given) > BOXED_LIMIT:
        return Verdict(0.0, "The content of \\boxed{…} is not an answer.", False)
    expected = str(answer)
    expected = last_boxed(expected) or expected
    if _equal(expected, given):
        return Verdict(1.0, None, True, given.strip())
    return Verdict(0.0, f"The answer {given.strip()[:200]} is not correct.", True, given.strip())


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` with balanced braces (`\{` does not count); None if there is none.

    It reads at most BOXED_LIMIT + 1 characters of content, so that a response with many boxes that never close takes
    linear time.
    """
    for mark in reversed(list(_BOX.finditer(text))):
        content = _balanced(text, mark.end() - 1)
        if content is not None:
            return content
    return None


def _balanced(text: str, brace: int) -> str | None:
    depth, position = 0, brace
    stop = min(len(text), brace + BOXED_LIMIT + 2)
    while position < stop:
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[brace + 1 : position]
        position += 1
    return text[brace + 1 : stop] if stop < len(text) else None  # too long: the caller refuses it


def _equal(expected: str, given: str) -> bool:
    if expected.split() == given.split():
        return True  # also for answers that are no mathematics
    gold, parsed = _parse(expected), _parse(given)
    if not gold or not parsed:
        return False
    return bool(math_verify.verify(gold, parsed, timeout_seconds=None))


def _parse(content: str) -> list:
    latex = f"\\boxed{{{content.strip(' $')}}}"
    return math_verify.parse(f"${latex}$", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
