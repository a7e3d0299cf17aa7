"""The errors that the bridge raises."""

from __future__ import annotations

from megatron_srpo.core.errors import UserError


class BridgeError(UserError):
    """Weights do not fit, are missing, or have no rule. The message says what was expected, what came, and the cure."""
