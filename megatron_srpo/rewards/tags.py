r"""Finds text between tags, or in a `\boxed{…}`, in time linear in the length of the response whatever it contains."""

from __future__ import annotations

import re

BOXED_LIMIT = 2000  # characters; a longer box is no answer, and parsing it could take minutes
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{")


def last_tagged(text: str, tag: str) -> str | None:
    """The text between the last `<tag>` and the `</tag>` after it, stripped; None if there is no such pair."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening)
    end = text.find(closing, start) if start >= 0 else -1
    return text[start + len(opening) : end].strip() if end >= 0 else None


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
