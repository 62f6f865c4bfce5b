"""What the tests of whole runs, `test_run_*.py`, train with, one run that many of them look at, and offline wandb."""

from pathlib import Path

import pytest
import torch
import wandb
from accelerate.state import AcceleratorState
from run_lab import EVERY_THIRD, Lab
from small import GLOBAL_MICRO_BATCH, NUM_STEPS, make_rows, save_small_model


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """As many rows as six steps of two micro-batches read."""
    return make_rows(NUM_STEPS * 2 * GLOBAL_MICRO_BATCH)


@pytest.fixture(scope="session")
def lab(tmp_path_factory, rows) -> Lab:
    """One for all files, to train `evaluated` once: no two tests write to a folder of the same name."""
    lab = Lab(tmp_path_factory.mktemp("runs"))
    save_small_model(lab.folder / "model")
    lab.write_rows("rows.jsonl", rows)
    lab.write_rows("evaluation.jsonl", make_rows(7))
    return lab


@pytest.fixture(scope="session")
def evaluated(lab) -> dict[str, float]:
    """Metrics of a run that has left `evaluated`, with checkpoints; nobody changes these files."""
    torch.set_num_threads(1)  # as in every test: others are compared with it bit for bit
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluation = {"do_eval": True, "validation_file": lab.folder / "evaluation.jsonl", "per_device_eval_batch_size": 2}
    return lab.train("evaluated", **EVERY_THIRD, **evaluation)


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch) -> Path:
    """Where an offline wandb writes its runs: a process reads the environment once, unless wandb is torn down."""
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    yield tmp_path / "wandb"
    wandb.teardown()
