"""Text from data, templates, checkpoints and reward functions, as it may be shown in a terminal."""

from __future__ import annotations

import re

# C0 and C1 control characters except the tab and the line break, and the marks that turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters as escapes (\\x1b), so that it cannot move the cursor, set the title, clear the
    screen or hide a part of itself. Lone surrogates are shown as escapes too."""
    return (
        CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        .encode("utf-8", "backslashreplace")
        .decode()
    )
