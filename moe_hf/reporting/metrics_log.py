"""The entries of a run's `metrics.jsonl`: read line by line, checked, and freed of what a resumed run has redone."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import DataError

METRICS_NAME = "metrics.jsonl"

# The entries that are not numbers: of each layer_N, the experts' shares of all assignments.
LOADS = ("expert_load", "eval_expert_load")
_LAYER = re.compile(r"layer_(\d+)")


@dataclass
class MetricsLog:
    """What counts of a file of metrics.

    Attributes:
        training: the entries with a `loss`, by rising step; `expert_load` is {layer index: float32 array `(E,)`}.
        evaluations: the entries with an `eval_loss`, by rising step.
        notes: sentences on what was left out.
    """

    training: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_metrics_log(path: Path) -> MetricsLog:
    """Read a file of one JSON object a line.

    A run that was killed may have left its last line torn: such a line is left out, with a note. A run that was resumed
    from a checkpoint goes back to its step: the entries of later steps that it had logged before are left out, with a
    note.

    Raises:
        DataError: there is no such file, it has no entry, or a line of it is not an entry.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give the OUTPUT_DIR of a run that has logged."
        ) from error
    log = MetricsLog()
    torn = lines.pop()  # what follows the last newline: nothing, unless the writer was cut off
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _add(log, _parse(line, f"line {number} of {path}"))
    if torn.strip():
        try:
            entry = _parse(torn, "")
        except DataError:
            log.notes.append(f"The last line of {METRICS_NAME} is torn and was left out.")
        else:
            _add(log, entry)
    if not log.training and not log.evaluations:
        raise DataError(f"{path} has no entry with a loss or an eval_loss; give a run that has logged at least once.")
    log.evaluations.sort(key=lambda entry: entry["step"])
    _check_sizes(log, path)
    return log


def _add(log: MetricsLog, entry: dict) -> None:
    """Append an entry to its list; what it supersedes goes."""
    step = entry["step"]
    if "loss" in entry:
        if log.training and log.training[-1]["step"] >= step:
            before = len(log.training)
            log.training = [old for old in log.training if old["step"] < step]
            log.evaluations = [old for old in log.evaluations if old["step"] < step]
            redone = before - len(log.training)
            log.notes.append(
                f"Resumed before step {step:,}: what had been logged from there on was left out "
                f"({redone:,} training {'entry' if redone == 1 else 'entries'})."
            )
        log.training.append(entry)
    elif "eval_loss" in entry:
        log.evaluations = [old for old in log.evaluations if old["step"] != step]
        log.evaluations.append(entry)


def _check_sizes(log: MetricsLog, path: Path) -> None:
    sizes: dict[int, int] = {}
    for entry in (*log.training, *log.evaluations):
        for key in entry.keys() & set(LOADS):
            for layer, loads in entry[key].items():
                if sizes.setdefault(layer, loads.size) != loads.size:
                    raise DataError(
                        f"{path} has {loads.size} experts in layer {layer} at step {entry['step']}, but "
                        f"{sizes[layer]} before; give runs of one model each."
                    )


def _parse(line: bytes, where: str) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); every line must be one JSON object.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise DataError(f"{where} is not an object with an integer 'step', as every log entry is.")
    for key, value in entry.items():
        if key in LOADS:
            entry[key] = _loads(value, f"{key} in {where}")
    return entry


def _loads(value: object, where: str) -> dict[int, np.ndarray]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not an object of lists, one for each layer_N.")
    loads = {}
    for name, shares in value.items():
        layer = _LAYER.fullmatch(name)
        try:
            array = np.asarray(shares, dtype=np.float32)
        except (TypeError, ValueError):
            array = np.empty(0)
        if layer is None or array.ndim != 1 or array.size == 0:
            raise DataError(f"{name!r} of {where} must be a layer_N with a list of one number for each expert.")
        loads[int(layer[1])] = array
    return loads
