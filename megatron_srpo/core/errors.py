"""Errors that are shown to the user as one message, without a traceback."""


class UserError(ValueError):
    """A mistake of the user, or of the machine. str() is the whole message: what was expected, what came, the cure."""


class ConfigError(UserError):
    """A configuration that must not be run."""
