"""Finds text between tags of a response, in time linear in its length whatever it contains."""

from __future__ import annotations


def last_tagged(text: str, tag: str) -> str | None:
    """The text between the last `<tag>` and the `</tag>` after it, stripped; None if there is no such pair."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening)
    end = text.find(closing, start) if start >= 0 else -1
    return text[start + len(opening) : end].strip() if end >= 0 else None


def after_thinking(text: str) -> str:
    """The text after the last `</think>`; the whole text if there is none."""
    return text.rpartition("</think>")[2]
