"""Errors that are shown to the user as one message, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct. str() is the whole message: what was expected, what came, the cure."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is most like `name`, or "" when none is like it. It begins with a space."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" The nearest known name is {match[0]!r}." if match else ""
