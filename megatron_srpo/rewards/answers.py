r"""Reads the reference answers of a data set: `#### 72`, `**72**`, `Answer: 72` and `\boxed{72}` all mean 72.

Nothing here imports a library, because the driver checks every row of the data with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_srpo.rewards.registry import RewardError
from megatron_srpo.rewards.tags import last_boxed
from megatron_srpo.rewards.tooluse import expected_calls

REFERENCE_LIMIT = 500  # characters of a reference answer; more is a worked solution
_HASHES = re.compile(r"####(.*)\s*\Z")  # the end of a worked solution, as GSM8K writes it
_LEAD = re.compile(r"(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|option)\s*(?:is\b\s*:?|:)\s*", re.IGNORECASE)
_MARKDOWN = re.compile(r"(\*\*|__|`)(.*)\1\.?", re.DOTALL)
_LETTER = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]{1,2}(?:\s.*)?)?", re.DOTALL)
# "(A) and (C)", of several right options.
_ANOTHER_LETTER = re.compile(r"[)\].:]\W*(?:and|or|&|,|;|/)\W*[A-Za-z][)\].:]*\s*\Z")


def math_reference(answer: object) -> str:
    """The answer of a row of kind math. RewardError if it is a text from which no answer can be read."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RewardError(f"kind 'math' expects text or a number as answer, got {type(answer).__name__}")
    text = _bare(str(answer))
    if not text or "\n" in text or len(text) > REFERENCE_LIMIT:
        raise RewardError(
            "kind 'math' expects the answer alone, or a solution that ends in \\boxed{answer} or #### answer, got "
            f"{str(answer)[-80:]!r}"
        )
    if last_boxed(f"\\boxed{{{text}}}") != text:
        raise RewardError(f"kind 'math' expects an answer whose braces are balanced, got {text[-80:]!r}")
    return text


def mcq_reference(answer: object) -> str:
    """The answer of a row of kind mcq, a capital letter. RewardError if it is no letter."""
    text = _bare(answer) if isinstance(answer, str) else ""
    found = _LETTER.fullmatch(text)
    if found is None or _ANOTHER_LETTER.search(text):
        raise RewardError(f"kind 'mcq' expects the letter of the right option as answer, got {answer!r:.80}")
    return found[1].upper()


def exact_reference(answer: object) -> str:
    """The answer of a row of kind exact. RewardError if it is no text or number."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RewardError(f"kind 'exact' expects text or a number as answer, got {type(answer).__name__}")
    text = str(answer).strip()
    if not text:
        raise RewardError(
            "kind 'exact' expects an answer that is not empty, because an empty response would be correct"
        )
    return text


READERS = {"math": math_reference, "mcq": mcq_reference, "exact": exact_reference, "tooluse": expected_calls}


def unreadable(kind: str, answer: object, functions: Mapping[str, str]) -> str | None:
    """Why a row's reference answer cannot be scored: every response would get reward 0. None if it can be, or if the
    kind is not one of READERS. `functions` are the user's own, which override a kind."""
    if kind in functions or kind not in READERS:
        return None
    try:
        READERS[kind](answer)
    except RewardError as error:
        return str(error)
    return None


def _bare(text: str) -> str:
    """The answer without what is written around it."""
    text = text.strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return " ".join(boxed.split())  # a matrix may be written on several lines
    hashes = _HASHES.search(text)
    text = hashes[1].strip() if hashes else text
    before = None
    while text != before:  # marks may be nested: **Answer:** 72, Answer: **72**
        before = text
        text = text.replace(":**", "**:", 1) if text.startswith("**") and ":**" in text else text
        lead = re.match(r"\*\*([^*]*)\*\*\s*:\s*", text)
        text = text[lead.end() :] if lead and _LEAD.fullmatch(f"{lead[1]}:") else text
        lead = _LEAD.match(text)
        text = text[lead.end() :] if lead else text
        marked = _MARKDOWN.fullmatch(text)
        text = (marked[2] if marked and marked[1] not in marked[2] else text).strip()
    return text
