"""What the runs that are done violence to have in common."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fault_server import Chain, Start
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, make_rows, recipe, save_small_model

from moe_hf.checkpoint.manifest import checkpoints_of, is_whole


@dataclass(frozen=True)
class Lab:
    """A folder with a model, rows and DeepSpeed configurations, beside which runs leave their outputs."""

    folder: Path

    def words(self, name: str, zero: int, **others) -> list[str]:
        """Return the command line of a run whose order, dropout and optimizer all have to be resumed."""
        values = {
            "model_name_or_path": self.folder / "model",
            "train_file": self.folder / "rows.jsonl",
            "output_dir": self.folder / name,
            "deepspeed": self.folder / f"zero{zero}.json",
            "config_overrides": "attention_dropout=0.1",
            "train_sampling_strategy": "random",
            "bf16": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "resume_from_checkpoint": "auto",
        }
        return flags(recipe([]), 2, **(values | others))

    def chain(self, name: str, zero: int, *starts: Start, **others) -> Chain:
        """Return a chain of starts of this run."""
        output_dir = others.get("output_dir", self.folder / name)
        return Chain(name, self.words(name, zero, **others), str(output_dir), list(starts) or [Start()])

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the exported weights of a finished run."""
        return load_file(self.folder / name / "hf" / "model.safetensors")

    def assert_same_weights(self, name: str, reference: str) -> None:
        """Two finished runs have exported the same, bit for bit."""
        weights, expected = self.weights(name), self.weights(reference)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items()), name

    def assert_tidy(self, name: str) -> None:
        """Nothing is left of what was begun, and the checkpoints that are kept are whole."""
        output_dir = self.folder / name
        assert not list(output_dir.glob(".*"))
        checkpoints = checkpoints_of(output_dir)
        assert [path.name for path in checkpoints] == [f"checkpoint-{NUM_STEPS}", f"checkpoint-{NUM_STEPS - 1}"]
        assert all(is_whole(path, part="all") for path in checkpoints)


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """The folder."""
    folder = tmp_path_factory.mktemp("fault")
    save_small_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    for zero in (2, 3):
        (folder / f"zero{zero}.json").write_text(json.dumps(deepspeed_json(zero, 2)))
    return Lab(folder)
