"""Evaluation is over tokens: sums of every sample, added by a loop here."""

import math

import numpy as np
import pytest
import torch
from small import make_rows, small_config
from transformers import EvalPrediction

from moe_hf import MoEForCausalLM
from moe_hf.modeling_moe import MoECausalLMOutput
from moe_hf.training.collator import CausalLMCollator
from moe_hf.training.evaluation import compute_metrics, sample_statistics


def summed_cross_entropy(logits: torch.Tensor, labels: list[int]) -> tuple[float, int]:
    """Return the sum over the labels of one row that count, and their number."""
    total, count = 0.0, 0
    for position, label in enumerate(labels[1:]):
        if label != -100:
            scores = logits[position].double()
            total += (scores.exp().sum().log() - scores[label]).item()
            count += 1
    return total, count


def metrics_of(*statistics: torch.Tensor) -> dict[str, float]:
    return compute_metrics(EvalPrediction(predictions=torch.cat(statistics).numpy(), label_ids=None))


def test_every_sample_has_its_own_sums():
    torch.manual_seed(3)
    logits = torch.randn(3, 5, 11)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 7, -100, 8], [-100] * 5])
    outputs = MoECausalLMOutput(logits=logits, aux_loss=torch.tensor(1.25), z_loss=torch.tensor(0.5))
    statistics = sample_statistics(outputs, labels)
    assert statistics.shape == (3, 4) and statistics.dtype == torch.float32
    for row, of_logits, of_labels in zip(statistics, logits, labels, strict=True):
        total, count = summed_cross_entropy(of_logits, of_labels.tolist())
        assert row.tolist() == pytest.approx([total, count, 1.25, 0.5], rel=1e-5)


def test_rounded_logits_are_summed_in_float32():
    torch.manual_seed(4)
    logits = torch.randn(2, 40, 11).bfloat16()
    labels = torch.randint(11, (2, 40))
    statistics = sample_statistics(MoECausalLMOutput(logits=logits), labels)
    expected = [summed_cross_entropy(*row)[0] for row in zip(logits, labels.tolist(), strict=True)]
    assert statistics[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert not statistics[:, 2:].any()


def test_loss_is_the_mean_over_tokens_not_over_batches():
    """Batches of unequal length with masked labels: the mean of the batches' means is something else."""
    torch.manual_seed(5)
    model = MoEForCausalLM(small_config()).eval()
    rows, collate = make_rows(7), CausalLMCollator(pad_token_id=0)
    batches = [collate(rows[:6]), collate(rows[6:])]
    total, count, aux, z, means = 0.0, 0, 0.0, 0.0, []
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        sums = [summed_cross_entropy(*row) for row in zip(output.logits, batch["labels"].tolist(), strict=True)]
        of_batch, tokens = (sum(column) for column in zip(*sums, strict=True))
        total, count = total + of_batch, count + tokens
        aux, z = aux + tokens * output.aux_loss.item(), z + tokens * output.z_loss.item()
        means.append(of_batch / tokens)
    metrics = metrics_of(*(sample_statistics(o, b["labels"]) for o, b in zip(outputs, batches, strict=True)))
    assert metrics == {
        "loss": pytest.approx(total / count, rel=1e-6),
        "perplexity": pytest.approx(math.exp(total / count), rel=1e-5),
        "tokens": count,
        "aux_loss": pytest.approx(aux / count, rel=1e-6),
        "z_loss": pytest.approx(z / count, rel=1e-6),
    }
    assert abs(sum(means) / 2 - metrics["loss"]) > 1e-3


def test_a_dense_model_has_no_router_losses():
    metrics = metrics_of(torch.tensor([[6.0, 3.0, 0.0, 0.0], [4.0, 1.0, 0.0, 0.0]]))
    assert metrics == {"loss": 2.5, "perplexity": pytest.approx(math.exp(2.5)), "tokens": 4}


def test_values_are_plain_numbers_that_json_can_hold():
    metrics = metrics_of(torch.tensor([[6.0, 3.0, 1.0, 2.0]]))
    assert {name: type(value) for name, value in metrics.items()} == {
        "loss": float,
        "perplexity": float,
        "tokens": int,
        "aux_loss": float,
        "z_loss": float,
    }


def test_without_a_label_there_is_no_loss():
    metrics = compute_metrics(EvalPrediction(predictions=np.zeros((2, 4)), label_ids=None))
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["perplexity"])


def test_a_hopeless_model_has_infinite_perplexity():
    """Exponentials of more than 709 do not fit; that is no reason to end a run."""
    with np.errstate(over="ignore"):
        assert metrics_of(torch.tensor([[1000.0, 1.0, 0.0, 0.0]]))["perplexity"] == math.inf
