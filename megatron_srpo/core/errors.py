"""Errors that are shown to the user as one message, without a traceback."""


class UserError(ValueError):
    """A mistake that the user can correct. str() is the whole message: what was expected, what came, the cure."""


class ConfigError(UserError):
    """A configuration that cannot be run."""
