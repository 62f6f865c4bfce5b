"""The file of `--dataset_mixture`: several sources of training data, and how much of each.

It is a list in YAML or JSON, with one entry for each source:

    - dataset_name: HuggingFaceFW/fineweb-edu
      dataset_config_name: sample-10BT
      weight: 0.7
    - train_file: code/*.jsonl
      text_column: content
      weight: 0.3
"""

import difflib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..errors import DataError
from ..yaml_values import parse_yaml

if TYPE_CHECKING:
    from .arguments import DataArguments

_FLAGS = ("train_file", "dataset_name", "dataset_config_name", "text_column")
_KEYS = (*_FLAGS, "split", "weight")


@dataclass(frozen=True)
class MixtureSource:
    """One entry of the file."""

    data_args: "DataArguments"
    """The run's, as if this source were the only one."""
    weight: float = 1.0
    """How many of its documents are drawn, relative to the other sources."""
    split: str = "train"
    """The split of `dataset_name` to train on."""


def sources_of(data_args: "DataArguments") -> list[MixtureSource]:
    """Return the sources to train on: those of the mixture, or the one that the flags name.

    Raises:
        DataError: The file cannot be read or says something else than sources with weights.
    """
    path = data_args.dataset_mixture
    if path is None:
        return [MixtureSource(data_args)]
    entries = _read(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"dataset_mixture {path!r} must hold a list of sources, each with a weight; see docs/data.md")
    return [_source(entry, f"source {number} of {path!r}", data_args) for number, entry in enumerate(entries, start=1)]


def _read(path: str) -> object:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        return json.loads(text) if path.endswith(".json") else parse_yaml(text)
    except OSError as error:
        raise DataError(f"dataset_mixture {path!r} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"dataset_mixture {path!r} is not valid: {' '.join(str(error).split())}") from None


def _source(entry: object, place: str, data_args: "DataArguments") -> MixtureSource:
    if not isinstance(entry, dict):
        raise DataError(f"{place} is {entry!r}; give a train_file or a dataset_name, and a weight")
    for key in entry:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"use {', '.join(_KEYS)}"
            raise DataError(f"{place} has the unknown key {key!r}; {hint}")
    if ("train_file" in entry) == ("dataset_name" in entry):
        raise DataError(f"{place} needs either a train_file or a dataset_name")
    for key in (*_FLAGS, "split"):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            raise DataError(f"{place}: {key}={entry[key]!r} must be a text")
    if "split" in entry and "train_file" in entry:
        raise DataError(f"{place}: split={entry['split']!r} has no effect on a train_file; leave it out")
    weight = entry.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise DataError(f"{place}: weight={weight!r} must be a number above 0")
    flags = dict.fromkeys(_FLAGS) | {"text_column": data_args.text_column}
    flags |= {key: value for key, value in entry.items() if key in _FLAGS}
    flags |= {"dataset_mixture": None, "validation_file": None}
    if data_args.validation_file is not None:
        flags["validation_split_percentage"] = 0  # nothing is held out where there is validation data
    alone = replace(data_args, **flags)
    return MixtureSource(alone, float(weight), entry.get("split", "train"))
