"""The one family of errors that a user can cause.

Each carries one sentence: what is wrong, its value, what would be right. Entry points print that
sentence once and exit with code 2; every other exception keeps its traceback, because it is ours.
"""


class UserError(ValueError):
    """Base of all mistakes that the user can correct."""


class ConfigError(UserError):
    """A model configuration, a DeepSpeed JSON or a flag is wrong or contradicts another."""


class DataError(UserError):
    """A data file, column or tokenizer is missing, empty, malformed or unfit for the model."""


class CheckpointError(UserError):
    """A checkpoint or export is missing, torn, of another model or of another topology."""
