"""Losses, norms, weights and evaluations of whole runs, against an oracle and formulas written out."""

import json
import math
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from small import GLOBAL_MICRO_BATCH, make_rows, recipe

from moe_hf import MoEForCausalLM

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(((t - expected[name]).norm() / expected[name].norm()).item() for name, t in actual.items())


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
