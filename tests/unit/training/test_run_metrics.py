"""What a run logs of itself: every entry in metrics.jsonl and for every reporter, its work and its throughput."""

import json
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import wandb
from small import NUM_STEPS
from transformers import Trainer

from moe_hf import MoEForCausalLM
from moe_hf.training.telemetry import throughput
from moe_hf.training.trainer import MoETrainer

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


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


def test_reporters_get_every_metric(lab, tmp_path, wandb_folder):
    """Wandb without an account, and TensorBoard where it is installed."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        EventAccumulator = None
    arguments = tmp_path / "arguments.yaml"
    arguments.write_text(f"report_to: [{'wandb, tensorboard' if EventAccumulator else 'wandb'}]\n")
    lab.train("reported", str(arguments), max_steps=2)
    wandb.finish()
    lines = [json.loads(line) for line in (lab.folder / "reported" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    names = ("loss", "ce_loss", "aux_loss/layer_1", "z_loss/layer_3", "tokens_per_second", "grad_norm", "skipped_steps")

    (record,) = wandb_folder.glob("offline-run-*/run-*.wandb")
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
