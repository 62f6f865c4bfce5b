"""Whole runs in this process, without DeepSpeed: what is trained, written, logged, resumed and skipped."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import liger_twin
import oracle
import pytest
import torch
import torch.nn.functional as F
import wandb
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small import GLOBAL_MICRO_BATCH, NUM_STEPS, flags, make_rows, recipe, save_small_model
from transformers import Trainer, TrainerCallback

from moe_hf import MoEForCausalLM, cli
from moe_hf.checkpoint.manifest import Progress, is_whole, read_manifest
from moe_hf.errors import CheckpointError, ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training import run, saving, speed_arguments
from moe_hf.training.preemption import Preempted
from moe_hf.training.run import build_trainer, execute, train_and_export
from moe_hf.training.telemetry import throughput
from moe_hf.training.trainer import MoETrainer, TrainingStopped

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
EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}
POISON = 99  # a token whose embedding is NaN


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


pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows(NUM_STEPS * 2 * GLOBAL_MICRO_BATCH)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, rows) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("pipeline"))
    save_small_model(lab.folder / "model")
    lab.write_rows("rows.jsonl", rows)
    lab.write_rows("evaluation.jsonl", make_rows(7))
    return lab


@pytest.fixture(scope="module")
def evaluated(lab) -> dict[str, float]:
    """Metrics of a run that has left `evaluated`, with checkpoints."""
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluation = {"do_eval": True, "validation_file": lab.folder / "evaluation.jsonl", "per_device_eval_batch_size": 2}
    return lab.train("evaluated", **EVERY_THIRD, **evaluation)


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(((t - expected[name]).norm() / expected[name].norm()).item() for name, t in actual.items())


def fail_to_write(*args, **kwargs) -> None:
    raise OSError("No space left on device")


def is_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(t.view(torch.int32), second[name].view(torch.int32)) for name, t in first.items())


# --------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trajectory_equals_the_oracle(lab, rows, accumulation):
    name = f"accumulation{accumulation}"
    lab.train(name, accumulation=accumulation)
    model = MoEForCausalLM.from_pretrained(lab.folder / "model").train()
    expected = oracle.train(model, recipe(rows, accumulation))
    steps = lab.steps(name)
    assert [entry["loss"] for entry in steps] == pytest.approx(expected.losses, rel=2e-6)
    assert [entry["grad_norm"] for entry in steps] == pytest.approx(expected.grad_norms, rel=2e-6)
    assert distance(lab.weights(f"{name}/hf"), expected.weights) <= 1e-5


def test_last_accumulation_of_an_epoch_may_be_incomplete(lab, rows):
    """Five micro-batches, two by two: the third step has one, whose mean is over its own tokens only."""
    epoch = {"max_steps": -1, "num_train_epochs": 1, "max_train_samples": 20, "max_shard_size": "1GB"}
    lab.train("incomplete", accumulation=2, save_strategy="steps", save_steps=2, **epoch)
    steps = lab.steps("incomplete")
    assert len(steps) == 3

    def first_step(folder: Path, of_step: list[dict], accumulation: int) -> tuple[float, float]:
        plan = recipe(of_step, accumulation)
        plan.num_steps = 1
        trajectory = oracle.train(MoEForCausalLM.from_pretrained(folder).train(), plan)
        return trajectory.losses[0], trajectory.grad_norms[0]

    whole = first_step(lab.folder / "model", rows[:8], 2)
    assert (steps[0]["loss"], steps[0]["grad_norm"]) == pytest.approx(whole, rel=2e-6)
    half = first_step(lab.folder / "incomplete" / "checkpoint-2" / "hf", rows[16:20], 1)
    assert (steps[2]["loss"], steps[2]["grad_norm"]) == pytest.approx(half, rel=2e-6)


def test_evaluation_is_over_tokens_and_written(lab, evaluated):
    model = MoEForCausalLM.from_pretrained(lab.folder / "evaluated" / "hf").eval()
    total, count = 0.0, 0
    for row in make_rows(7):
        log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - log_probs[position, label].item(), count + 1
    written = json.loads((lab.folder / "evaluated" / "eval_results.json").read_text())
    assert written["eval_tokens"] == evaluated["eval_tokens"] == count
    assert written["eval_loss"] == evaluated["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert written["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_evaluation_alone_writes_no_model(lab, evaluated):
    again = {"model_name_or_path": lab.folder / "evaluated" / "hf", "do_train": False, "do_eval": True}
    metrics = lab.train("evaluated_again", validation_file=lab.folder / "evaluation.jsonl", **again)
    assert metrics["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    assert {path.name for path in (lab.folder / "evaluated_again").iterdir()} == {
        "all_results.json",
        "eval_results.json",
        "metrics.jsonl",
    }


# --------------------------------------------------------------------------------------------------------------------
# What is left on the disk


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


def test_metrics_file_holds_every_log_entry(lab, evaluated):
    lines = [json.loads(line) for line in (lab.folder / "evaluated" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        parts = line["ce_loss"] + 0.05 * line["aux_loss"] + 0.02 * line["z_loss"]
        assert parts == pytest.approx(line["loss"], rel=1e-5)
        for name in ("aux_loss", "z_loss"):
            layers = [line[f"{name}/layer_{i}"] for i in (1, 3)]
            assert sum(layers) == pytest.approx(line[name])
        assert line["tokens_per_second"] > 0 and line["skipped_steps"] == 0
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [evaluated["eval_loss"]]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_smoothed_labels_train_and_plain_ones_are_evaluated(lab, rows, accumulation):
    """The first step's loss is that of the formula over the whole batch; perplexity is of the labels alone."""
    name, coef = f"smoothed{accumulation}", 0.01
    evaluation = {"do_eval": True, "validation_file": lab.folder / "evaluation.jsonl", "per_device_eval_batch_size": 2}
    smoothed = {"label_smoothing_factor": 0.2, "config_overrides": f"output_z_loss_coef={coef}"}
    metrics = lab.train(name, accumulation=accumulation, max_steps=1, **smoothed, **evaluation)
    (step,) = lab.steps(name)
    model = MoEForCausalLM.from_pretrained(lab.folder / "model").eval()
    ce, z_loss, count = 0.0, 0.0, 0
    for row in rows[: accumulation * GLOBAL_MICRO_BATCH]:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        targets = torch.tensor(row["labels"][1:])
        ce += F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum").item()
        z_loss += logits.logsumexp(-1)[targets != -100].square().sum().item()
        count += (targets != -100).sum().item()
    assert step["ce_loss"] == pytest.approx(ce / count, rel=1e-5)
    assert step["output_z_loss"] == pytest.approx(z_loss / count, rel=1e-5)
    parts = step["ce_loss"] + coef * step["output_z_loss"] + 0.05 * step["aux_loss"] + 0.02 * step["z_loss"]
    assert parts == pytest.approx(step["loss"], rel=1e-5)

    trained = MoEForCausalLM.from_pretrained(lab.folder / name / "hf").eval()
    assert trained.config.output_z_loss_coef == coef
    total, count = 0.0, 0
    for row in make_rows(7):
        targets = torch.tensor(row["labels"][1:])
        logits = trained(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += (targets != -100).sum().item()
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_floating_point_operations_count_active_parameters(lab, evaluated, rows):
    """6 for each token, padding too, and each element of a matrix that the token is multiplied with."""
    model = MoEForCausalLM.from_pretrained(lab.folder / "evaluated" / "hf")
    used = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_tokens" not in name:
            used += parameter.numel() // 2 if ".experts." in name else parameter.numel()  # 2 of 4 experts
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(4 * max(lengths[4 * step : 4 * step + 4]) for step in range(NUM_STEPS))
    assert evaluated["total_flos"] == 6 * used * tokens


def test_model_card_tells_the_measured_losses(lab, evaluated):
    card = (lab.folder / "evaluated" / "hf" / "README.md").read_text()
    first, last = lab.steps("evaluated")[0]["loss"], lab.steps("evaluated")[-1]["loss"]
    assert f"{first:.4f} at step 1, {last:.4f} at the end" in card
    assert f"| evaluation loss | {evaluated['eval_loss']:.4f} |" in card


def test_time_before_the_first_step_is_left_out_of_the_throughput(lab, monkeypatch):
    """Moving the model, making its optimizer and loading a checkpoint takes minutes for a large one."""
    waited, prepare = [0.0], Trainer._prepare_for_training

    def prepare_slowly(*args):
        waited[0] += 1e4
        return prepare(*args)

    monkeypatch.setattr(Trainer, "_prepare_for_training", prepare_slowly)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + waited[0]))
    lab.train("timed", max_steps=1)
    assert lab.steps("timed")[0]["tokens_per_second"] > 1


def test_save_total_limit_keeps_the_newest(lab):
    lab.train("limited", save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (lab.folder / "limited").glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]
    assert (lab.folder / "limited" / "checkpoint-5" / "manifest.json").is_file()


def test_evaluating_is_no_part_of_the_throughput(lab, monkeypatch):
    evaluate = MoETrainer.evaluate

    def take_long(self, *args, **kwargs) -> dict:
        throughput.time.sleep(1.0)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(MoETrainer, "evaluate", take_long)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "validation_file": lab.folder / "evaluation.jsonl"}
    lab.train("evaluating", max_steps=4, **evaluation)
    lines = [json.loads(line) for line in (lab.folder / "evaluating" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    num_tokens = [after["num_tokens"] - before["num_tokens"] for before, after in pairwise(steps)]
    for entry, tokens in zip(steps[1:], num_tokens, strict=True):
        assert entry["tokens_per_second"] > 2 * tokens, "a step takes some hundredths of a second"


def test_reporters_get_every_metric(lab, tmp_path, monkeypatch):
    """Wandb without an account, and TensorBoard where it is installed."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        EventAccumulator = None
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    arguments = tmp_path / "arguments.yaml"
    arguments.write_text(f"report_to: [{'wandb, tensorboard' if EventAccumulator else 'wandb'}]\n")
    try:
        lab.train("reported", str(arguments), max_steps=2)
    finally:
        wandb.finish()
        wandb.teardown()
    lines = [json.loads(line) for line in (lab.folder / "reported" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    names = ("loss", "ce_loss", "aux_loss/layer_1", "z_loss/layer_3", "tokens_per_second", "grad_norm", "skipped_steps")

    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    recorded = record.read_bytes()
    assert all(f"train/{name}".encode() in recorded for name in names)
    assert all(str(entry["loss"]).encode() in recorded for entry in steps)
    if EventAccumulator is None:
        pytest.skip("tensorboard is not installed; wandb has got everything")
    (folder,) = (lab.folder / "reported" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in names:
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(entry["step"], pytest.approx(entry[name])) for entry in steps], name


# --------------------------------------------------------------------------------------------------------------------
# Going on, and beginning again


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self._step


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


def test_checkpoint_is_refused_where_it_does_not_fit(lab, evaluated):
    checkpoint = lab.folder / "evaluated" / "checkpoint-3"
    with pytest.raises(CheckpointError, match="the training dtype must stay float32"):
        lab.train("refused", resume_from_checkpoint=checkpoint, bf16=True)
    with pytest.raises(CheckpointError, match="num_experts_per_tok=2 there but 1 here"):
        lab.train("refused", resume_from_checkpoint=checkpoint, num_experts_per_tok=1)
    assert not (lab.folder / "refused").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_reset_optimizer_starts_from_the_weights_alone(lab, evaluated):
    checkpoint = lab.folder / "evaluated" / "checkpoint-3"
    lab.train("reset", resume_from_checkpoint=checkpoint, reset_optimizer=True, max_steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("from_weights", model_name_or_path=checkpoint / "hf", max_steps=3)
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [e[key] for e in lab.steps("reset")] == [e[key] for e in lab.steps("from_weights")]
    assert is_identical(lab.weights("reset/hf"), lab.weights("from_weights/hf"))
    assert not is_identical(lab.weights("reset/hf"), lab.weights("evaluated/hf"))


def test_weights_alone_are_saved_when_told(lab):
    lab.train("weights_only", max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True)
    checkpoint = lab.folder / "weights_only" / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists() and is_whole(checkpoint)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CheckpointError, match=r"holds weights only \(--save_only_model\); add --reset_optimizer"):
        lab.train("continued_weights", resume_from_checkpoint=checkpoint)
    lab.train("continued_weights", resume_from_checkpoint=checkpoint, reset_optimizer=True, max_steps=1)
    assert [entry["step"] for entry in lab.steps("continued_weights")] == [1]


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


# --------------------------------------------------------------------------------------------------------------------
# Signals


class Signal(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self._step, self._number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self._step - 1:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_after_the_step_and_the_run_goes_on(lab, number):
    """Also between an evaluation that was left out and one that was made: dropout is the same."""
    changes = {"config_overrides": "attention_dropout=0.1", "save_strategy": "no", "save_only_model": True}
    evaluation = {"validation_file": lab.folder / "evaluation.jsonl", "eval_strategy": "steps", "eval_steps": 2}
    name = signal.Signals(number).name
    if not (lab.folder / "not_evaluated").exists():
        lab.train("not_evaluated", **changes)
        AcceleratorState._reset_state(reset_partial_state=True)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    trainer = build_trainer(lab.words(name, resume_from_checkpoint="auto", **changes, **evaluation), FailureRelay())
    trainer.add_callback(Signal(4, number))
    try:
        with pytest.raises(Preempted, match=rf"Stopped by {name} after step 4; .*/checkpoint-4\. Go on with"):
            execute(trainer)
    finally:
        for each, handler in zip((signal.SIGTERM, signal.SIGUSR1), handlers, strict=True):
            signal.signal(each, handler)
    log = (lab.folder / name / "metrics.jsonl").read_text()
    assert log.count("eval_loss") == 1  # of step 2
    assert [path.name for path in (lab.folder / name).glob("checkpoint-*")] == ["checkpoint-4"]
    assert is_whole(lab.folder / name / "checkpoint-4")

    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train(name, resume_from_checkpoint="auto", **changes, **evaluation)
    lines = [json.loads(line) for line in (lab.folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert is_identical(lab.weights(f"{name}/hf"), lab.weights("not_evaluated/hf"))
    # A run that ends by itself leaves signals as they were.
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers


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
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock, buffer = (
        tmp_path / "operator" / "lock",
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_1_0"),
    )
    lock.parent.mkdir()
    try:
        for path in (lock, buffer):
            path.touch()
        run._remove_what_killed_runs_have_left()
        assert (lock.exists(), buffer.exists()) == ((False, False) if local_rank == "0" else (True, True))
    finally:
        buffer.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Steps that are not finite


@pytest.fixture(scope="module")
def poisoned(lab, rows) -> dict[str, Path]:
    """Flags of a run in which one token's embedding is NaN, and rows that have it in the third step."""
    save_small_model(lab.folder / "poisoned")
    model = MoEForCausalLM.from_pretrained(lab.folder / "poisoned")
    model.model.embed_tokens.weight.data[POISON] = math.nan
    model.save_pretrained(lab.folder / "poisoned")
    clean = [{key: [3 if v == POISON else v for v in values] for key, values in row.items()} for row in rows]
    clean[2 * GLOBAL_MICRO_BATCH + 1]["input_ids"][0] = POISON
    once = lab.write_rows("once.jsonl", clean)
    return {"model_name_or_path": lab.folder / "poisoned", "train_file": once}


def test_a_step_with_nan_is_skipped_and_counted(lab, poisoned):
    lab.train("skipping", **poisoned, save_strategy="steps", save_steps=1)
    steps = lab.steps("skipping")
    assert [entry["skipped_steps"] for entry in steps] == [0, 0, 1, 1, 1, 1]
    assert [math.isfinite(entry["loss"]) for entry in steps] == [True, True, False, True, True, True]
    before, skipped, after = (lab.weights(f"skipping/checkpoint-{n}/hf") for n in (2, 3, 4))
    assert is_identical(before, skipped)
    assert not is_identical(skipped, after)
    poison = lab.weights("skipping/hf").pop("model.embed_tokens.weight")
    assert poison.isfinite().all(dim=1).sum() == len(poison) - 1


def test_skipped_steps_are_counted_on_after_resuming(lab, poisoned):
    folder = lab.folder / "skipping"
    shutil.copytree(folder / "checkpoint-4", lab.folder / "skipping_on" / "checkpoint-4")
    lab.train("skipping_on", **poisoned, resume_from_checkpoint=True)
    assert [entry["skipped_steps"] for entry in lab.steps("skipping_on")] == [0, 0, 1, 1, 1, 1]


def test_what_is_not_finite_is_null_in_the_metrics_file(lab, poisoned):
    lines = (lab.folder / "skipping" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines if '"loss"' in line]
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]


def test_steps_skipped_in_a_row_are_counted_on_after_resuming(lab, poisoned):
    always = [row | {"input_ids": [POISON, *row["input_ids"][1:]]} for row in make_rows(24)]
    changes = poisoned | {"train_file": lab.write_rows("always.jsonl", always), "max_skipped_steps": 3}
    lab.train("in_a_row", **changes, max_steps=2, save_strategy="steps", save_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row .* \(step 3, max_skipped_steps=3\)"):
        lab.train("in_a_row", **changes, resume_from_checkpoint=True)


def test_too_many_skipped_steps_stop_the_run_with_a_checkpoint(lab, poisoned):
    always = [row | {"input_ids": [POISON, *row["input_ids"][1:]]} for row in make_rows(24)]
    changes = poisoned | {"train_file": lab.write_rows("always.jsonl", always)}
    with pytest.raises(TrainingStopped, match=r"2 steps in a row .*max_skipped_steps=2.*checkpoint-2\."):
        lab.train("stopped", **changes, max_skipped_steps=2)
    assert (lab.folder / "stopped" / "checkpoint-2" / "manifest.json").is_file()
    assert not (lab.folder / "stopped" / "hf").exists()


# --------------------------------------------------------------------------------------------------------------------
# Argument files, and flags of TrainingArguments


@pytest.mark.parametrize("extension", ["yaml", "json"])
def test_all_arguments_from_a_file_and_flags_override_it(lab, tmp_path, extension):
    values = {
        "model_name_or_path": str(lab.folder / "model"),
        "train_file": str(lab.folder / "rows.jsonl"),
        "cache_dir": str(lab.folder / "cache"),
        "output_dir": str(tmp_path / "out"),
        "validation_split_percentage": 0,
        "block_size": 32,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "do_train": True,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    path = tmp_path / f"arguments.{extension}"
    if extension == "json":
        path.write_text(json.dumps(values | {"learning_rate": 1e-4}))
    else:
        # YAML takes 1e-4 for text.
        path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()) + "learning_rate: 1e-4\n")
    train_and_export([str(path), "--max_steps", "2", "--save_strategy", "no"], FailureRelay())
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry] == [1e-4, 1e-4]
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_resuming_may_be_said_in_a_file(lab, evaluated, tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text("resume_from_checkpoint: true\n")
    shutil.copytree(lab.folder / "evaluated" / "checkpoint-3", lab.folder / "continued" / "checkpoint-3")
    lab.train("continued", str(path))
    assert [entry["step"] for entry in lab.steps("continued")] == [1, 2, 3, 4, 5, 6]


def test_ligers_kernels_train_alike(lab, evaluated, monkeypatch):
    """All but the rotation, as the command line says; a twin of Liger stands in for a GPU."""
    liger_twin.install(monkeypatch, **liger_twin.ELEMENTWISE)
    asked = []
    monkeypatch.setattr(speed_arguments, "check_liger", lambda settings, compiles: asked.append(settings))
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, settings: None)
    used = []
    monkeypatch.setattr(liger_twin.LigerRopeFunction, "apply", lambda *args: pytest.fail("rotated"))
    for kind in (liger_twin.LigerRMSNormFunction, liger_twin.LigerSiLUMulFunction):
        monkeypatch.setattr(kind, "apply", lambda *args, kind=kind, run=kind.apply: (used.append(kind), run(*args))[1])
    lab.train("liger", use_liger_kernel=True, liger_kernel_config='{"rope": false}', save_strategy="no")
    assert asked == [{"rope": False}] and len(set(used)) == 2
    losses = [[entry["loss"] for entry in lab.steps(name)] for name in ("liger", "evaluated")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("flag", [{"label_smoothing_factor": 1.0}, {"eval_do_concat_batches": False}])
def test_flags_that_the_losses_cannot_follow_are_refused(lab, flag):
    evaluation = {"do_eval": True, "validation_file": lab.folder / "evaluation.jsonl", "per_device_eval_batch_size": 2}
    with pytest.raises(ConfigError, match=next(iter(flag))):
        lab.train(f"refused_{next(iter(flag))}", max_steps=1, **evaluation, **flag)


# --------------------------------------------------------------------------------------------------------------------
# moe-hf generate


def test_export_writes_text(lab, evaluated, capsys):
    cli.main(
        [
            "generate",
            str(lab.folder / "evaluated" / "hf"),
            *("--prompt", "w5 w6"),
            *("--max_new_tokens", "5"),
            *("--temperature", "0"),
        ]
    )
    printed = capsys.readouterr().out.split()
    model = MoEForCausalLM.from_pretrained(lab.folder / "evaluated" / "hf").eval()
    tokens = [5, 6]
    while len(tokens) < 7 and tokens[-1] != 1:
        tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    assert printed == [f"w{token}" for token in tokens if token not in (0, 1)]
    assert len(printed) > 2


def test_generate_reads_prompts_until_the_input_ends(lab, evaluated, capsys, monkeypatch):
    prompts = iter(["w5", "w7 w8"])

    def type_prompt(shown: str) -> str:
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_prompt)
    cli.main(["generate", str(lab.folder / "evaluated" / "hf"), "--max_new_tokens", "2", "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["w5", "w7"]
    assert lines[1].startswith("w7 w8 ")


@pytest.mark.parametrize(
    ("damaged", "words", "named"),
    [
        (None, ["--prompt", "w5", "--max_new_tokens", "0"], "max_new_tokens"),
        (None, ["--prompt", ""], "prompt"),
        ("model.safetensors", ["--prompt", "w5"], "damaged/hf"),
        ("config.json", ["--prompt", "w5"], "damaged/hf"),
        ("tokenizer.json", ["--prompt", "w5"], "damaged/hf"),
    ],
)
def test_generate_says_what_it_cannot_use(lab, evaluated, tmp_path, capsys, damaged, words, named):
    folder = tmp_path / "damaged" / "hf"
    shutil.copytree(lab.folder / "evaluated" / "hf", folder)
    if damaged:
        (folder / damaged).write_text("{")
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(folder), *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


@pytest.mark.parametrize("wrong", ["missing", "evaluated/checkpoint-3"])
def test_generate_refuses_a_folder_without_an_export(lab, evaluated, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(lab.folder / wrong), "--prompt", "w5"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("give OUTPUT_DIR/hf of a run.")


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
