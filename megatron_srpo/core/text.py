"""Text from data, templates, checkpoints and reward functions, as it may be shown in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable

# C0 and C1 control characters except the tab and the line break, and the marks that turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
MOST_CAUSES, LONGEST_CAUSE = 3, 300  # characters


def causes(errors: Iterable[str]) -> str:
    """The distinct errors, the most frequent first: "time-out (5 times); KeyError: 'x' (once)"; "" for none.

    Exceptions that differ in what they quote count as one, because they quote what a response says: "KeyError: '…'".
    """
    groups: dict[str, list[str]] = {}
    for error in errors:
        groups.setdefault(_cause(error), []).append(error)
    counts = {cause if len(set(same)) > 1 else same[0]: len(same) for cause, same in groups.items()}
    if len(counts) < 2:
        return "".join(counts)[:LONGEST_CAUSE]
    found = [
        f"{cause[:LONGEST_CAUSE]} ({'once' if count == 1 else f'{count} times'})"
        for cause, count in sorted(counts.items(), key=lambda one: -one[1])[:MOST_CAUSES]
    ]
    rest = len(counts) - len(found)
    return "; ".join(found) + (f"; and {rest} other cause{'s' if rest > 1 else ''}" if rest else "")


def _cause(error: str) -> str:
    before, exception, said = error.partition("exception: ")
    return before + exception + QUOTED.sub("'…'", said) if exception else error


def clause(text: object) -> str:
    """A message, of a library for example, as a part of a sentence: without the stop at its end."""
    return str(text).rstrip().rstrip(".")


def visible(text: str) -> str:
    """The text with control characters as escapes (\\x1b), so that it cannot move the cursor, set the title, clear the
    screen or hide a part of itself. Lone surrogates are shown as escapes too."""
    return (
        CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        .encode("utf-8", "backslashreplace")
        .decode()
    )


THINK = "<think>"


def after_thinking(text: str) -> str:
    """What a model says behind its thinking: the text after the last `</think>`, or all of it if there is none. ""
    if that begins with a `<think>` that never ends: the thinking was cut, and its drafts are no answer."""
    said = text.rpartition("</think>")[2]
    return "" if said.lstrip().startswith(THINK) else said
