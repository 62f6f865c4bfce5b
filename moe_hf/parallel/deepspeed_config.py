"""Read the DeepSpeed JSON and answer what the rest of the package asks about it; nobody else reads it by hand."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from moe_hf.errors import ConfigError
from moe_hf.parallel.deepspeed_schema import as_json

Config = dict[str, Any]


def read_deepspeed_json(source: str | os.PathLike | Config) -> Config:
    """Read a DeepSpeed JSON file, or copy a dict, more strictly than DeepSpeed and Accelerate do.

    Args:
        source (`str`, `os.PathLike` or `dict`): path of a JSON file, or what such a file holds.

    Returns:
        `dict`: a deep copy that the caller may change.

    Raises:
        ConfigError: if the file cannot be read, is not strict JSON, names a key twice or holds no object.
    """
    if isinstance(source, dict):
        return copy.deepcopy(source)
    try:
        # As for TrainingArguments, the JSON itself may stand in place of a file's name.
        inline = str(source).lstrip().startswith("{")
        text = str(source) if inline else Path(source).read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"DeepSpeed JSON {source} cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"DeepSpeed JSON {source} is not JSON in line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"DeepSpeed JSON {source} is not UTF-8 text") from None
    except ConfigError as error:
        raise ConfigError(f"DeepSpeed JSON {source}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f'DeepSpeed JSON {source} must hold an object {{"key": value, ...}}, not {as_json(config)}')
    return config


def with_expert_parallel_size(config: Config, ep_size: int) -> Config:
    """Return a copy of a DeepSpeed JSON with another size of expert parallelism.

    Args:
        config (`dict`): the DeepSpeed JSON, left as it is.
        ep_size (`int`): ranks that share one set of experts; 0 switches AutoEP off. With 1 AutoEP is on, and every
            rank holds all experts.

    Returns:
        `dict`: the copy; other keys of `expert_parallel` are kept.

    Raises:
        ConfigError: if `ep_size` is no integer of at least 0.
    """
    if not is_int(ep_size) or ep_size < 0:
        raise mistake("expert_parallel_size", ep_size, "must be an integer of at least 0, which switches it off")
    config = copy.deepcopy(config)
    section = get_section(config, "expert_parallel") | {"enabled": ep_size > 0, "autoep_size": ep_size}
    if ep_size == 0:
        del section["autoep_size"]
    config["expert_parallel"] = section
    return config


def zero_stage(config: Config) -> int:
    """Return the ZeRO stage, 0 when the JSON does not name one.

    Raises:
        ConfigError: if the stage is not 0, 1, 2 or 3.
    """
    stage = get_section(config, "zero_optimization").get("stage", 0)
    if not is_int(stage) or not 0 <= stage <= 3:
        raise mistake("zero_optimization.stage", stage, "must be 0, 1, 2 or 3")
    return stage


def autoep_enabled(config: Config) -> bool:
    """Return whether DeepSpeed will replace the sparse layers by expert-parallel ones.

    Raises:
        ConfigError: if `expert_parallel.enabled` is neither true nor false.
    """
    enabled = get_section(config, "expert_parallel").get("enabled", False)
    if not isinstance(enabled, bool):
        raise mistake("expert_parallel.enabled", enabled, "must be true or false")
    return enabled


def expert_parallel_size(config: Config) -> int:
    """Return how many ranks share one set of experts; 0 when AutoEP is off, which is not the same as 1.

    Raises:
        ConfigError: if the size is no positive integer.
    """
    if not autoep_enabled(config):
        return 0
    size = lookup(config, "expert_parallel.autoep_size", 1)
    if not is_int(size) or size < 1:
        raise mistake("expert_parallel.autoep_size", size, 'must be a positive integer ("enabled": false switches off)')
    return size


def mistake(key: str, value: Any, wanted: str) -> ConfigError:
    """Return the error `key=value wanted`."""
    return ConfigError(f"{key}={as_json(value)} {wanted}")


def lookup(config: Config, path: str, default: Any) -> Any:
    """Return the value at a dotted path, or `default` where there is none."""
    *sections, key = path.split(".")
    for section in sections:
        config = get_section(config, section)
    return config.get(key, default)


def get_section(config: Config, name: str) -> Config:
    """Return a section of the JSON, empty where it is missing.

    Raises:
        ConfigError: if it is no object.
    """
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise mistake(name, section, f'must be an object like "{name}": {{...}} or be left out')
    return section


def is_int(value: Any) -> bool:
    """Return whether the value is a whole number; `true` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> Config:
    values = dict(pairs)
    for key in values:
        if sum(key == other for other, _ in pairs) > 1:
            raise ConfigError(f'key "{key}" stands twice in one object; keep one of them')
    return values


def _no_constant(text: str) -> float:
    raise ConfigError(f"{text} is not a JSON number; write a finite one")
