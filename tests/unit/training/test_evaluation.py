"""Evaluation is over tokens: sums of every sample, added by a loop here."""

import math
from types import SimpleNamespace

import pytest
import torch
from small import make_rows, small_config
from transformers import EvalPrediction

from moe_hf import MoEForCausalLM
from moe_hf.data.collator import CausalLMCollator
from moe_hf.modeling_outputs import MoECausalLMOutput
from moe_hf.training.evaluation import EvaluationMetrics, gather_once, join_pieces, sample_statistics
from moe_hf.training.telemetry.loads import LatestLoads


def summed_cross_entropy(logits: torch.Tensor, labels: list[int]) -> tuple[float, int]:
    """Return the sum over the labels of one row that count, and their number."""
    total, count = 0.0, 0
    for position, label in enumerate(labels[1:]):
        if label != -100:
            scores = logits[position].double()
            total += (scores.exp().sum().log() - scores[label]).item()
            count += 1
    return total, count


def metrics_of(*statistics: torch.Tensor, loads: LatestLoads | None = None) -> dict[str, float]:
    """Return the result of an evaluation with these statistics as its steps."""
    metrics = EvaluationMetrics(small_config(), loads or LatestLoads())
    *steps, last = (EvalPrediction(predictions=step, label_ids=None) for step in statistics)
    for step in steps:
        assert metrics(step, compute_result=False) == {}
    return metrics(last, compute_result=True)


def statistics_of(model: MoEForCausalLM, batch: dict) -> torch.Tensor:
    """Return what an evaluation keeps of a batch."""
    outputs = model(**batch, skip_logits=True, output_router_statistics=True)
    return sample_statistics(outputs, batch["labels"], batch.get("attention_mask"))


def row_of(losses: list[float], counts: list[float], num_tokens: float = 1.0) -> list[float]:
    """Return a sample's row for two sparse layers, whose tokens are undecided and have logits of 0."""
    return [*losses, num_tokens, *[num_tokens * math.log(4)] * 2, 0.0, 0.0, *counts]


def assignments_of(model: MoEForCausalLM, batch: dict) -> list[list[list[int]]]:
    """Return for each sparse layer and row how many of its tokens that are not padding have each expert as a choice."""
    with torch.no_grad():
        outputs = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), output_router_logits=True)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    layers = []
    for logits in outputs.router_logits:
        rows = []
        for of_row, kept in zip(logits.unflatten(0, mask.shape), mask.tolist(), strict=True):
            counts = [0] * logits.shape[1]
            for token, keep in zip(of_row.tolist(), kept, strict=True):
                for expert in sorted(range(len(token)), key=lambda e: token[e])[-2:]:
                    counts[expert] += keep
            rows.append(counts)
        layers.append(rows)
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sample_has_its_own_sums(dtype):
    torch.manual_seed(3)
    model = (
        MoEForCausalLM(small_config(num_experts=0, shared_expert_intermediate_size=0, shared_expert_gate=False))
        .to(dtype)
        .eval()
    )
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 7, -100, 8], [-100] * 5])
    batch = {"input_ids": torch.randint(128, labels.shape), "labels": labels}
    with torch.no_grad():
        logits, outputs = model(**batch).logits, model(**batch, skip_logits=True)
    outputs.aux_loss, outputs.z_loss = torch.tensor(1.25), torch.tensor(0.5)
    statistics = sample_statistics(outputs, labels)
    assert statistics.shape == (3, 4) and statistics.dtype == torch.float32
    for row, of_logits, of_labels in zip(statistics, logits, labels, strict=True):
        total, count = summed_cross_entropy(of_logits, of_labels.tolist())
        assert row.tolist() == pytest.approx([total, count, 1.25, 0.5], rel=1e-5)


def test_a_model_without_routers_has_no_router_losses():
    outputs = MoECausalLMOutput(sequence_ce_losses=torch.tensor([3.0, 4.0]))
    assert sample_statistics(outputs, torch.tensor([[1, 2], [-100, -100]])).tolist() == [[3, 1, 0, 0], [4, 0, 0, 0]]


def test_loss_is_the_mean_over_tokens_not_over_batches():
    """Batches of unequal length with masked labels: the mean of the batches' means is something else."""
    torch.manual_seed(5)
    model = MoEForCausalLM(small_config()).eval()
    rows, collate = make_rows(7), CausalLMCollator(pad_token_id=0)
    batches = [collate(rows[:6]), collate(rows[6:])]
    total, count, aux, z, means = 0.0, 0, 0.0, 0.0, []
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
        steps = [statistics_of(model, batch) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        sums = [summed_cross_entropy(*row) for row in zip(output.logits, batch["labels"].tolist(), strict=True)]
        of_batch, tokens = (sum(column) for column in zip(*sums, strict=True))
        total, count = total + of_batch, count + tokens
        aux, z = aux + tokens * output.aux_loss.item(), z + tokens * output.z_loss.item()
        means.append(of_batch / tokens)
    metrics = metrics_of(*steps)
    assert metrics_of(torch.cat(steps)) == pytest.approx(metrics, rel=1e-12), "all rows at once give the same"
    assert {name: metrics[name] for name in ("loss", "perplexity", "tokens", "aux_loss", "z_loss")} == {
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
    metrics = metrics_of(torch.zeros(2, 4))
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["perplexity"])


def test_a_hopeless_model_has_infinite_perplexity():
    """Exponentials of more than 709 do not fit; that is no reason to end a run."""
    assert metrics_of(torch.tensor([[1000.0, 1.0, 0.0, 0.0]]))["perplexity"] == math.inf


# --------------------------------------------------------------------------------------------------------------------
# Loads


def test_every_sample_has_its_own_assignments():
    """Counted token by token, with padding, in the columns after the four of the losses."""
    torch.manual_seed(8)
    model = MoEForCausalLM(small_config()).eval()
    batch = CausalLMCollator(pad_token_id=0)(make_rows(5))
    with torch.no_grad():
        statistics = statistics_of(model, batch)
    first, second = assignments_of(model, batch)
    assert statistics[:, 4].tolist() == [len(row["input_ids"]) for row in make_rows(5)]
    assert statistics[:, 9:].tolist() == [one + other for one, other in zip(first, second, strict=True)]


def test_distributions_are_those_of_all_tokens_that_are_not_padding():
    torch.manual_seed(12)
    model = MoEForCausalLM(small_config()).eval()
    rows, collate = make_rows(7), CausalLMCollator(pad_token_id=0)
    batches = [collate(rows[:4]), collate(rows[4:])]
    with torch.no_grad():
        metrics = metrics_of(*(statistics_of(model, batch) for batch in batches))
        alone = [model(torch.tensor([row["input_ids"]]), output_router_logits=True).router_logits for row in rows]
    for place, layer in enumerate((1, 3)):
        tokens = [logits for of_row in alone for logits in of_row[place].double()]
        entropies = []
        for logits in tokens:
            weights = [math.exp(logit) for logit in logits.tolist()]
            entropies.append(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))
        expected = sum(entropies) / len(entropies) / math.log(4)
        assert metrics[f"router_entropy/layer_{layer}"] == pytest.approx(expected, rel=1e-5)
        largest = max(abs(logit) for logits in tokens for logit in logits.tolist())
        assert metrics[f"router_logit_max/layer_{layer}"] == pytest.approx(largest, rel=1e-5)


def test_loads_are_those_of_all_samples():
    torch.manual_seed(9)
    model, loads = MoEForCausalLM(small_config()).eval(), LatestLoads()
    rows, collate = make_rows(9), CausalLMCollator(pad_token_id=0)
    batches = [collate(rows[start : start + 4]) for start in range(0, 9, 4)]
    with torch.no_grad():
        metrics = metrics_of(*(statistics_of(model, batch) for batch in batches), loads=loads)
    for number, name in enumerate(("layer_1", "layer_3")):
        counts = [0] * 4
        for batch in batches:
            for row in assignments_of(model, batch)[number]:
                counts = [total + count for total, count in zip(counts, row, strict=True)]
        assert sum(counts) == 2 * sum(len(row["input_ids"]) for row in rows)
        assert loads.eval[name] == [count / sum(counts) for count in counts]
        assert metrics[f"max_vio/{name}"] == pytest.approx(4 * max(counts) / sum(counts) - 1)
    assert metrics["max_vio"] == pytest.approx((metrics["max_vio/layer_1"] + metrics["max_vio/layer_3"]) / 2)
    entropies = [metrics[f"load_entropy/layer_{layer}"] for layer in (1, 3)]
    assert metrics["load_entropy"] == pytest.approx(sum(entropies) / 2)


def test_dead_experts_got_no_token_in_the_whole_evaluation():
    def step(*layers: list[int]) -> torch.Tensor:
        return torch.tensor([row_of([1.0, 1.0, 0.0, 0.0], [*layers[0], *layers[1]])])

    metrics = metrics_of(step([4, 0, 0, 0], [1, 1, 1, 0]), step([1, 1, 0, 0], [0, 0, 1, 1]))
    dead = {name: value for name, value in metrics.items() if name.startswith("dead")}
    assert dead == {"dead_experts/layer_1": 2, "dead_experts/layer_3": 0, "dead_experts": 2}


def test_counts_beyond_what_float32_holds_are_exact():
    """Every row's is one, but not their sum: 2**24 + 1 is no float32."""
    loads = LatestLoads()
    rows = torch.tensor([row_of([1.0, 1.0, 0.0, 0.0], [first, *[1.0] * 7]) for first in (2.0**24, 1.0, 1.0)])
    metrics_of(rows, rows[1:], loads=loads)
    total = 2**24 + 4 + 15
    assert loads.eval["layer_1"] == [(2**24 + 4) / total, 5 / total, 5 / total, 5 / total]


def test_every_evaluation_begins_anew():
    loads = LatestLoads()
    metrics = EvaluationMetrics(small_config(), loads)

    def evaluate(value: float, compute_result: bool = True) -> dict[str, float]:
        rows = torch.tensor([row_of([value, 1.0, value, value], [value, *[1.0] * 7])])
        return metrics(EvalPrediction(predictions=rows, label_ids=None), compute_result=compute_result)

    assert evaluate(3.0)["loss"] == 3.0
    first = loads.eval
    assert evaluate(5.0)["loss"] == 5.0
    assert first["layer_1"] == [0.5, 1 / 6, 1 / 6, 1 / 6] and loads.eval["layer_1"][0] == 5 / 8
    # One that did not come to its end.
    evaluate(100.0, compute_result=False)
    metrics.reset()
    assert (evaluate(3.0)["loss"], loads.eval) == (3.0, first)


def test_an_evaluation_without_routers_takes_back_the_loads_of_another():
    loads = LatestLoads(eval={"layer_1": [1.0]})
    metrics_of(torch.tensor([[6.0, 3.0, 0.0, 0.0]]), loads=loads)
    assert loads.eval is None


class Gathering:
    """An accelerator on four ranks, of which two in a row have the same rows."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks, each data-parallel rank's a hundred above those of the one before."""
        return torch.cat([tensor, tensor, tensor + 100, tensor + 100])


def test_rows_that_several_ranks_have_are_gathered_once():
    accelerator, rows = Gathering(), torch.arange(6).view(3, 2)
    with gather_once(accelerator, 2):
        assert torch.equal(accelerator.gather(rows), torch.cat([rows, rows + 100]))
        assert torch.equal(accelerator.gather(rows[:, 0]), torch.cat([rows[:, 0], rows[:, 0] + 100]))
    assert len(accelerator.gather(rows)) == 12
    with gather_once(accelerator, 1):
        assert len(accelerator.gather(rows)) == 12


def test_pieces_join_to_whole_sequences():
    """All is added up but the largest logits, here of two layers."""
    pieces = [torch.tensor([row_of([1.0, 2.0, 0.5, 0.25], [3.0] * 8, 4.0)]) for _ in range(2)]
    pieces[0][0, 7:9], pieces[1][0, 7:9] = torch.tensor([1.0, 9.0]), torch.tensor([5.0, 6.0])
    shared = SimpleNamespace(sum=lambda _: pieces[0] + pieces[1], max=lambda _: torch.maximum(*pieces))
    expected = row_of([2.0, 4.0, 1.0, 0.5], [6.0] * 8, 8.0)
    expected[7:9] = 5.0, 9.0
    assert join_pieces(pieces[0], shared, 2).tolist() == [pytest.approx(expected)]
