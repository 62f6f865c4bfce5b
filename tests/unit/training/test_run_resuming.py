"""A run goes on as if it had never stopped: weights, losses, the place in the data and the end of the schedule."""

import json
import shutil

import pytest
from accelerate.state import AcceleratorState
from run_lab import EVERY_THIRD, StopAfter, is_identical

from moe_hf.checkpoint.manifest import Progress, read_manifest
from moe_hf.errors import CheckpointError, ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import build_trainer, execute

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_resuming_continues_bit_for_bit(lab, max_shard_size):
    """Shuffled data and dropout: order and random numbers are part of what has to be resumed."""
    changes = {
        **EVERY_THIRD,
        "train_sampling_strategy": "random",
        "config_overrides": "attention_dropout=0.1",
        "max_shard_size": max_shard_size,
    }
    whole, halves = f"whole_{max_shard_size}", f"halves_{max_shard_size}"
    lab.train(whole, **changes)
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = build_trainer(lab.words(halves, **changes), FailureRelay())
    trainer.add_callback(StopAfter(3))
    execute(trainer)
    assert [entry["step"] for entry in lab.steps(halves)] == [1, 2, 3]
    assert not (lab.folder / halves / "checkpoint-6").exists()
    (lab.folder / halves / "hf" / "of_the_first_half.txt").write_text("an export is replaced whole")
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train(halves, resume_from_checkpoint=True, **changes)

    assert not (lab.folder / halves / "hf" / "of_the_first_half.txt").exists()
    for key in ("step", "loss", "grad_norm", "learning_rate", "aux_loss", "z_loss"):
        assert [entry[key] for entry in lab.steps(halves)] == [entry[key] for entry in lab.steps(whole)], key
    assert is_identical(lab.weights(f"{halves}/hf"), lab.weights(f"{whole}/hf"))
    assert not is_identical(lab.weights(f"{halves}/checkpoint-3/hf"), lab.weights(f"{whole}/hf"))


def test_auto_starts_anew_and_then_goes_on(lab, evaluated, capsys):
    """The same command line each time, in a folder where at first nothing but a killed run's rubbish is."""
    folder = lab.folder / "automatic"
    (folder / ".checkpoint-1.incomplete" / "checkpoint-1").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    changes = EVERY_THIRD | {"resume_from_checkpoint": "auto"}
    trainer = build_trainer(lab.words("automatic", **changes), FailureRelay())
    trainer.add_callback(StopAfter(4))
    execute(trainer)
    assert f"There is no whole checkpoint in {folder}. Starting anew." in capsys.readouterr().out
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-3"]
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("automatic", **changes)
    assert is_identical(lab.weights("automatic/hf"), lab.weights("evaluated/hf"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 4, 5, 6]


def test_run_that_was_killed_after_its_last_step_is_only_exported(lab, evaluated):
    shutil.copytree(lab.folder / "evaluated" / "checkpoint-6", lab.folder / "finished" / "checkpoint-6")
    lab.train("finished", resume_from_checkpoint="auto")
    assert [entry["step"] for entry in lab.steps("finished")] == [1, 2, 3, 4, 5, 6]
    assert is_identical(lab.weights("finished/hf"), lab.weights("evaluated/hf"))


def test_checkpoint_is_refused_where_it_does_not_fit(lab, evaluated):
    checkpoint = lab.folder / "evaluated" / "checkpoint-3"
    with pytest.raises(CheckpointError, match="the training dtype must stay float32"):
        lab.train("refused", resume_from_checkpoint=checkpoint, bf16=True)
    with pytest.raises(CheckpointError, match="num_experts_per_tok=2 there but 1 here"):
        lab.train("refused", resume_from_checkpoint=checkpoint, num_experts_per_tok=1)
    assert not (lab.folder / "refused").exists()


def test_reset_optimizer_starts_from_the_weights_alone(lab, evaluated):
    checkpoint = lab.folder / "evaluated" / "checkpoint-3"
    lab.train("reset", resume_from_checkpoint=checkpoint, reset_optimizer=True, max_steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("from_weights", model_name_or_path=checkpoint / "hf", max_steps=3)
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [e[key] for e in lab.steps("reset")] == [e[key] for e in lab.steps("from_weights")]
    assert is_identical(lab.weights("reset/hf"), lab.weights("from_weights/hf"))
    assert not is_identical(lab.weights("reset/hf"), lab.weights("evaluated/hf"))


def test_place_in_the_data_is_recorded_and_kept(lab):
    """Twenty rows in micro-batches of four, two by two: the third step of every epoch has one micro-batch."""
    changes = {"max_train_samples": 20, "max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    lab.train("counted", accumulation=2, num_train_epochs=1, **changes)
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("counted", accumulation=2, num_train_epochs=2, resume_from_checkpoint=True, **changes)
    progress = [read_manifest(lab.folder / "counted" / f"checkpoint-{step}").progress for step in range(1, 7)]
    assert progress == [
        Progress(step, samples_seen=samples, global_batch_size=8)
        for step, samples in enumerate([8, 16, 20, 28, 36, 40], start=1)
    ]


@pytest.mark.parametrize(("batch", "last"), [(8, 15), (2, 42), (4, 24)])
def test_epochs_end_where_they_end_with_another_batch_size(lab, batch, last):
    """48 rows, twice: 24 of them were read by 6 steps of 4 rows, and 72 are left."""
    two_epochs = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6}
    if not (lab.folder / "four_rows").exists():
        lab.train("four_rows", **two_epochs)
        AcceleratorState._reset_state(reset_partial_state=True)
    start = lab.folder / "four_rows" / "checkpoint-6"
    name = f"{batch}_rows"
    lab.train(name, **two_epochs | {"per_device_train_batch_size": batch, "resume_from_checkpoint": start})
    steps = lab.steps(name)
    assert steps[-1]["step"] == last and steps[-1]["epoch"] == 2.0
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3 / last, rel=1e-6)


def test_steps_are_those_asked_for_with_another_batch_size(lab):
    lab.train("few", save_strategy="steps", save_steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    start = lab.folder / "few" / "checkpoint-6"
    lab.train("more", max_steps=9, per_device_train_batch_size=2, resume_from_checkpoint=start)
    assert [entry["step"] for entry in lab.steps("more")] == list(range(1, 10))


def test_an_order_that_cannot_be_resumed_is_refused(lab):
    with pytest.raises(ConfigError, match="--train_sampling_strategy group_by_length orders the rows anew in each run"):
        lab.train("by_length", train_sampling_strategy="group_by_length", resume_from_checkpoint="auto")
