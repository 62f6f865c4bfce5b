"""What a run leaves in its output folder, and what a later one deletes of it."""

import json
import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from run_lab import is_identical

from moe_hf.errors import ConfigError
from moe_hf.training import run

EXPORTED = {
    "README.md",
    "config.json",
    "configuration_moe.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_moe.py",
    "router_losses.py",
    "router_rules.py",
    "router_selection.py",
    "kept_choices.py",
    "language_head.py",
    "liger_cross_entropy.py",
    "linear_cross_entropy.py",
    "modeling_outputs.py",
    "routing.py",
    "tokenizer.json",
    "tokenizer_config.json",
}

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


def test_a_run_leaves_its_results(lab, evaluated):
    folder = lab.folder / "evaluated"
    assert {path.name for path in folder.iterdir()} == {
        "all_results.json",
        "checkpoint-3",
        "checkpoint-6",
        "eval_results.json",
        "hf",
        "metrics.jsonl",
        "train_results.json",
        "trainer_state.json",
    }
    for export in (folder / "hf", folder / "checkpoint-3" / "hf", folder / "checkpoint-6" / "hf"):
        assert {path.name for path in export.iterdir()} == EXPORTED
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "manifest.json"):
        assert (folder / "checkpoint-3" / name).is_file()
    assert is_identical(lab.weights("evaluated/hf"), lab.weights("evaluated/checkpoint-6/hf"))
    assert not is_identical(lab.weights("evaluated/hf"), lab.weights("evaluated/checkpoint-3/hf"))


def test_model_card_tells_the_measured_losses(lab, evaluated):
    card = (lab.folder / "evaluated" / "hf" / "README.md").read_text()
    first, last = lab.steps("evaluated")[0]["loss"], lab.steps("evaluated")[-1]["loss"]
    assert f"{first:.4f} at step 1, {last:.4f} at the end" in card
    assert f"| evaluation loss | {evaluated['eval_loss']:.4f} |" in card


def test_evaluation_alone_writes_no_model(lab, evaluated):
    again = {"model_name_or_path": lab.folder / "evaluated" / "hf", "do_train": False, "do_eval": True}
    metrics = lab.train("evaluated_again", validation_file=lab.folder / "evaluation.jsonl", **again)
    assert metrics["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    assert {path.name for path in (lab.folder / "evaluated_again").iterdir()} == {
        "all_results.json",
        "eval_results.json",
        "metrics.jsonl",
    }


def test_earlier_run_is_deleted_only_when_told(lab):
    folder = lab.folder / "repeated"
    lab.train("repeated", max_steps=2, save_strategy="steps", save_steps=1)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds checkpoint-1; give another folder"):
        lab.train("repeated", max_steps=1)
    assert (folder / "checkpoint-2" / "hf" / "model.safetensors").is_file()

    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("repeated", max_steps=1, overwrite_output_dir=True)
    assert not list(folder.glob("checkpoint-*"))
    assert (folder / "notes.txt").read_text() == "mine"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]


def test_overwriting_deletes_what_a_run_leaves_and_nothing_else(lab):
    folder = lab.folder / "replaced"
    lab.train("replaced", max_steps=1, do_eval=True, validation_file=lab.folder / "evaluation.jsonl")
    mine = [folder / name for name in ("my_embeddings.pt", "data.bin", "lora.safetensors", "checkpoint-ideas/a.md")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (folder / "profile").mkdir()
    (folder / "profile" / "rank3.json.gz").touch()
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("replaced", max_steps=1, overwrite_output_dir=True)
    assert all(path.is_file() for path in mine) and not (folder / "profile").exists()
    # The run before was evaluated; this one was not.
    assert not (folder / "eval_results.json").exists()
    assert "eval_loss" not in json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_what_killed_runs_have_left_is_cleared_by_one_process_of_a_machine(tmp_path, monkeypatch, local_rank):
    """The lock of an operator that was being compiled, and shared memory of a run on the same port."""
    port = str(os.getpid())  # other processes may run this test at the same time
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock, buffer = (
        tmp_path / "operator" / "lock",
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_0"),
    )
    lock.parent.mkdir()
    try:
        for path in (lock, buffer):
            path.touch()
        run._remove_what_killed_runs_have_left()
        assert (lock.exists(), buffer.exists()) == ((False, False) if local_rank == "0" else (True, True))
    finally:
        buffer.unlink(missing_ok=True)
