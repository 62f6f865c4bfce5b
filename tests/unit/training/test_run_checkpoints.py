"""Which checkpoints a run keeps and what is in them, also when its disk is full; the best one is exported."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from run_lab import is_identical
from small import NUM_STEPS
from transformers import Trainer

from moe_hf.checkpoint.manifest import is_whole, read_manifest
from moe_hf.errors import CheckpointError
from moe_hf.training import saving

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


def test_save_total_limit_keeps_the_newest(lab):
    lab.train("limited", save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (lab.folder / "limited").glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]
    assert (lab.folder / "limited" / "checkpoint-5" / "manifest.json").is_file()


def test_checkpoint_is_replaced_when_its_step_comes_again(lab):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    lab.train("again", **changes)
    folder = lab.folder / "again"
    first = read_manifest(folder / "checkpoint-2")
    (folder / "checkpoint-2" / "notes.txt").write_text("of the first time")
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("again", resume_from_checkpoint=folder / "checkpoint-1", **changes)
    assert not (folder / "checkpoint-2" / "notes.txt").exists()
    assert read_manifest(folder / "checkpoint-2").saved_at > first.saved_at
    assert is_whole(folder / "checkpoint-2", part="all")
    assert not list(folder.glob(".*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_to_write(*args, **kwargs) -> None:
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    "failing", [(Trainer, "_save_optimizer_and_scheduler"), (Trainer, "_save_rng_state"), (saving, "write_manifest")]
)
def test_failing_save_is_told_and_leaves_what_was_there(lab, monkeypatch, failing):
    """A run that goes on from an earlier checkpoint comes to the later ones again."""
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    name = f"no_space_{failing[1]}"
    lab.train(name, **changes)
    before = contents(lab.folder / name)
    monkeypatch.setattr(*failing, fail_to_write)
    AcceleratorState._reset_state(reset_partial_state=True)
    sentence = r"Could not write \S+/checkpoint-2: No space left on device \([\d,]+ MB are free on its disk\)\.$"
    with pytest.raises(CheckpointError, match=sentence):
        lab.train(name, resume_from_checkpoint=lab.folder / name / "checkpoint-1", **changes)
    after = contents(lab.folder / name)
    assert {name: content for name, content in after.items() if name != "metrics.jsonl"} == {
        name: content for name, content in before.items() if name != "metrics.jsonl"
    }


def test_weights_alone_are_saved_when_told(lab):
    lab.train("weights_only", max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True)
    checkpoint = lab.folder / "weights_only" / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists() and is_whole(checkpoint)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CheckpointError, match=r"holds weights only \(--save_only_model\); add --reset_optimizer"):
        lab.train("continued_weights", resume_from_checkpoint=checkpoint)
    lab.train("continued_weights", resume_from_checkpoint=checkpoint, reset_optimizer=True, max_steps=1)
    assert [entry["step"] for entry in lab.steps("continued_weights")] == [1]


def test_best_model_is_exported(lab):
    lab.train(
        "best",
        learning_rate=0.3,  # so large that the loss rises and falls
        validation_file=lab.folder / "evaluation.jsonl",
        load_best_model_at_end=True,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    )
    state = json.loads((lab.folder / "best" / "trainer_state.json").read_text())
    evaluations = {entry["eval_loss"]: entry["step"] for entry in state["log_history"] if "eval_loss" in entry}
    best = evaluations[min(evaluations)]
    assert best != NUM_STEPS
    assert is_identical(lab.weights("best/hf"), lab.weights(f"best/checkpoint-{best}/hf"))


def test_state_names_the_best_checkpoint_by_its_place(lab):
    """Not by the folder in which it was written; with a limit of 1 the newest is kept beside it."""
    evaluation = {"validation_file": lab.folder / "evaluation.jsonl", "eval_strategy": "steps", "eval_steps": 1}
    every = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    lab.train("best_of_one", learning_rate=0.3, **evaluation, **every)
    checkpoints = {path.name: path for path in (lab.folder / "best_of_one").glob("checkpoint-*")}
    assert len(checkpoints) == 2 and f"checkpoint-{NUM_STEPS}" in checkpoints
    for path in checkpoints.values():
        best = json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert Path(best) in checkpoints.values() and best != str(lab.folder / f"checkpoint-{NUM_STEPS}")
