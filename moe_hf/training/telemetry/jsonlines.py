"""Every log entry as a line of `metrics.jsonl`, from which `moe-hf report` draws."""

import json
import math
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

from ...reporting.metrics_log import METRICS_NAME
from .loads import LatestLoads

logger = logging.get_logger(__name__)


class JsonLinesCallback(TrainerCallback):
    """Append every log entry to `metrics.jsonl` in the output folder; what is NaN or infinite is null there.

    Args:
        loads: written beside the scalars as `expert_load` and `eval_expert_load`.
    """

    def __init__(self, loads: LatestLoads) -> None:
        self._loads = loads

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Cut off the half of a line that a killed run may have left, to which the next one would be glued."""
        path = Path(args.output_dir) / METRICS_NAME
        if state.is_world_process_zero and path.is_file():
            with open(path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not (state.is_world_process_zero and logs):
            return
        entry = {"step": state.global_step, **logs}
        if (loads := self._loads.of(logs)) is not None:
            entry["expert_load" if "loss" in logs else "eval_expert_load"] = loads
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with open(Path(args.output_dir) / METRICS_NAME, "a") as file:
                file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")
        except OSError as error:
            # No reason to stop: where the disk is full, the next checkpoint will say so.
            logger.warning_once(f"{METRICS_NAME} cannot be written: {error.strerror}.")


def _finite(value):
    """Return the value with `None` for every number in it that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
