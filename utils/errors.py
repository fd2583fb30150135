"""Errors that a user can fix: entry points print the message and stop, without a traceback."""


class UserError(Exception):
    """An error in the input; the message names the file, key or value, and how to fix it."""


class ConfigError(UserError):
    """A config, a `key=value` override or their combination is invalid."""


class DataError(UserError):
    """A data set, or one file of it, is missing, damaged or unsafe."""


class CheckpointError(UserError):
    """A weights file is missing, unreadable, or does not fit the model."""
