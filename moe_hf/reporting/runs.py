"""A training run as plain arrays: what it has logged, and the configuration of its model."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from .metrics_log import LOADS, METRICS_NAME, read_metrics_log

_OF_A_LAYER = re.compile(r"(.+)/layer_(\d+)")


class Table:
    """Log entries of one kind as columns, one row for each of the T entries.

    Args:
        entries: by rising step. What is null or not a number is NaN here, as is what an entry lacks.
    """

    def __init__(self, entries: Sequence[dict]) -> None:
        self._num_rows = len(entries)
        self._columns: dict[str, np.ndarray] = {}
        self._layers: dict[str, list[int]] = {}
        for row, entry in enumerate(entries):
            for key, value in entry.items():
                if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                    self._cell(key)[row] = np.nan if value is None or not np.isfinite(value) else value
        for key in self._columns:
            if match := _OF_A_LAYER.fullmatch(key):
                self._layers.setdefault(match[1], []).append(int(match[2]))
        self.loads = _loads(entries)

    def _cell(self, key: str) -> np.ndarray:
        if key not in self._columns:
            self._columns[key] = np.full(self._num_rows, np.nan)
        return self._columns[key]

    def __len__(self) -> int:
        return self._num_rows

    def column(self, key: str) -> np.ndarray | None:
        """Return the values of `key`, of shape (T,), or `None` where no entry has one."""
        return self._columns.get(key)

    def layers(self, key: str) -> list[int]:
        """Return the indices of the layers for which `key` was logged, rising."""
        return sorted(self._layers.get(key, ()))

    def by_layer(self, key: str) -> np.ndarray | None:
        """Return the values of `key` in each layer that has it, of shape (T, L), or `None` where no layer has."""
        columns = [self._columns[f"{key}/layer_{layer}"] for layer in self.layers(key)]
        return np.stack(columns, axis=1) if columns else None

    def last(self, key: str) -> float | None:
        """Return the value of `key` in the last entry, NaN if it is not finite there, `None` where no entry has one."""
        column = self.column(key)
        return None if column is None else float(column[-1])


@dataclass(frozen=True)
class Run:
    """A run of which a report tells.

    Attributes:
        name: what it is called in the report: the end of its path that tells it from the other runs.
        path: its output folder.
        training: the entries of training steps.
        evaluations: those of evaluations.
        config: the fields of its model's configuration, empty where no export or checkpoint tells them.
        notes: sentences on what was left out of the report.
    """

    name: str
    path: Path
    training: Table
    evaluations: Table
    config: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def loss_key(self) -> str:
        """The key of the training loss that compares with `eval_loss`: the cross-entropy without router losses."""
        return "loss" if self.training.column("ce_loss") is None else "ce_loss"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in these output folders, in this order.

    Raises:
        ConfigError: a folder does not exist or is given twice.
        DataError: a folder has no `metrics.jsonl`, or one that cannot be understood.
    """
    resolved = [path.resolve() for path in paths]
    for path, full in zip(paths, resolved, strict=True):
        if not full.is_dir():
            raise ConfigError(f"{path} is not a folder; give the OUTPUT_DIR of a run.")
        if resolved.count(full) > 1:
            raise ConfigError(f"{path} is given {resolved.count(full)} times; give each run once.")
    return [_read_run(path, name) for path, name in zip(resolved, distinct_names(resolved), strict=True)]


def _read_run(path: Path, name: str) -> Run:
    log = read_metrics_log(path / METRICS_NAME)
    return Run(name, path, Table(log.training), Table(log.evaluations), _read_config(path), tuple(log.notes))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return for each path as few of its last parts as tell it from the others."""
    names = []
    for path in paths:
        length = 1
        while sum(other.parts[-length:] == path.parts[-length:] for other in paths) > 1:
            length += 1
        names.append("/".join(path.parts[-length:]) or str(path))
    return names


def _read_config(run: Path) -> dict:
    """Return the configuration in the export, else in that of the newest checkpoint that has one."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: _number(path.name), reverse=True)
    for folder in (run, *checkpoints):
        try:
            config = json.loads((folder / "hf" / "config.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return config
    return {}


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _loads(entries: Sequence[dict]) -> dict[int, np.ndarray]:
    """Return each layer's loads, of shape (T, E), NaN in the rows of entries without them."""
    loads: dict[int, np.ndarray] = {}
    for row, entry in enumerate(entries):
        for key in LOADS:
            for layer, shares in entry.get(key, {}).items():
                if layer not in loads:
                    loads[layer] = np.full((len(entries), len(shares)), np.nan, dtype=np.float32)
                loads[layer][row] = shares
    return dict(sorted(loads.items()))
