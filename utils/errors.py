"""Errors that a user can cause and mend: entry points print their sentence and stop, without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong; the message names the file, key or value, and the way out."""


class ConfigError(UserError):
    """A config, a `key=value` override or their combination cannot be used."""


class DataError(UserError):
    """A data set, or one file of it, is missing, broken or unsafe."""


class CheckpointError(UserError):
    """A weights file is missing, unreadable, or does not fit the model."""
