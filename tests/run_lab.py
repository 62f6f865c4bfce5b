"""Whole runs in the process of the test, without DeepSpeed, and what they leave."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from small import flags, recipe
from transformers import TrainerCallback

from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import train_and_export

EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}


@dataclass
class Lab:
    """A folder with what command lines name: `model`, `rows.jsonl`, `evaluation.jsonl`, and outputs beside them."""

    folder: Path

    def words(self, name: str, accumulation: int = 1, **changes) -> list[str]:
        """Return the command line of a run of the recipe that writes to the folder `name`; `None` leaves a flag out."""
        paths = {
            "model_name_or_path": self.folder / "model",
            "train_file": self.folder / "rows.jsonl",
            "cache_dir": self.folder / "cache",
            "output_dir": self.folder / name,
            "use_cpu": True,
        }
        words = flags(recipe([], accumulation), 1, **(paths | changes))
        pairs = zip(words[::2], words[1::2], strict=True)
        return [word for flag, value in pairs if value != "None" for word in (flag, value)]

    def train(self, name: str, *first: str, **changes) -> dict[str, float]:
        """Run a command line, with the words `first` before its flags, and return the metrics."""
        return train_and_export([*first, *self.words(name, **changes)], FailureRelay())

    def steps(self, name: str) -> list[dict]:
        state = json.loads((self.folder / name / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for path in (self.folder / name).glob("*.safetensors"):
            tensors |= load_file(path)
        return tensors

    def write_rows(self, name: str, rows: list[dict]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


class StopAfter(TrainerCallback):
    """Ends a run early, with all that is done at an end."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self._step


def is_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(t.view(torch.int32), second[name].view(torch.int32)) for name, t in first.items())
