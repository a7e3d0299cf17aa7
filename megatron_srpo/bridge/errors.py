"""What the bridge raises at a user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megatron_srpo.core.errors import UserError


class BridgeError(UserError):
    """Weights that do not fit, are missing, or have no rule: expected, got, cure."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' The nearest known name is …', or '' when nothing is near."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" The nearest known name is {match[0]!r}." if match else ""
