"""Files that hold arguments or fields of a configuration, in JSON or YAML."""

import json
from pathlib import Path

import yaml

from ..errors import ConfigError

EXTENSIONS = (".json", ".yaml", ".yml")


def read_argument_file(path: str) -> dict[str, str | list[str]]:
    """Return the arguments in a file as a command line would say them.

    Everything stays text, so that the parser judges and converts it as it does flags: a folder called 2024, the word
    `no` of --save_strategy and the number 1e-4 mean the same in both places. Mappings become JSON; null is left out.

    Raises:
        ConfigError: the file cannot be read, is not valid, or holds no mapping.
    """
    try:
        text = Path(path).read_text()
        values = json.loads(text) if path.endswith(".json") else yaml.load(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"Cannot read the arguments in {path}: {error.strerror}.") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one mapping of argument names to values, not a {type(values).__name__}.")
    return {name: _as_word(value) for name, value in values.items() if value not in (None, "null", "~")}


def _as_word(value) -> str | list[str]:
    if isinstance(value, list):
        return [_as_word(item) for item in value]
    if isinstance(value, dict):
        return json.dumps(_typed(value))
    return value if isinstance(value, str) else json.dumps(value)


def _typed(value):
    """Give the texts inside a mapping their types back; what is no JSON value is a word."""
    if isinstance(value, dict):
        return {name: _typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
