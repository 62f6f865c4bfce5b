"""What a whole run writes to metrics.jsonl, against the initial model: with a learning rate of 0 it stays that.

Four rows make a micro-batch and two of these a step; an entry is written for every second step. Everything is counted
token by token from router logits, and attention is read from the weights of the eager implementation.
"""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from small import flags, make_rows, recipe, save_small_model
from transformers import Trainer

from moe_hf import MoEForCausalLM
from moe_hf.data.collator import CausalLMCollator
from moe_hf.modeling_moe import MoEAttention
from moe_hf.parameter_families import family_of
from moe_hf.training.run import train_and_export

NUM_STEPS = 6
NEVER_CHOSEN = 2
LAYERS = (1, 3)


class NoRelay:
    """Nobody watches a run of one process."""

    def watch(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The initial model, whose router biases keep every token from one expert, and rows."""
    folder = tmp_path_factory.mktemp("logged")
    save_small_model(folder / "model", router_balancing="loss_free", router_bias_update_speed=0.0)
    model = MoEForCausalLM.from_pretrained(folder / "model")
    for layer in LAYERS:
        model.model.layers[layer].mlp.gate.e_score_correction_bias[NEVER_CHOSEN] = -9.0
    model.save_pretrained(folder / "model")
    for name, rows in (("rows", make_rows(8 * NUM_STEPS)), ("evaluation", make_rows(60)[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, name: str, **changes) -> list[dict]:
    """Train, and return the lines of metrics.jsonl."""
    values = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "validation_file": folder / "evaluation.jsonl",
        "cache_dir": folder / "cache",
        "output_dir": folder / name,
        "use_cpu": True,
        "learning_rate": 0.0,
        "max_steps": NUM_STEPS,
        "logging_steps": 2,
        "dead_expert_steps": 3,
        "max_grad_norm": 1e9,
    }
    words = flags(recipe([], accumulation=2), 1, **(values | changes))
    train_and_export(words, NoRelay())
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def entries(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def logged(folder) -> list[dict]:
    """A run that is evaluated between two entries, which must not be counted."""
    evaluating = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    return run(folder, "logged", **evaluating)


@pytest.fixture(scope="module")
def model(folder) -> MoEForCausalLM:
    return MoEForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").train()


def tokens_of(model: MoEForCausalLM, rows: list[dict]) -> list[list[list[float]]]:
    """Return the logits of every token, row by row and so without padding, for each sparse layer."""
    layers: list[list[list[float]]] = [[] for _ in LAYERS]
    for row in rows:
        with torch.no_grad():
            outputs = model(torch.tensor([row["input_ids"]]), output_router_logits=True)
        for layer, logits in zip(layers, outputs.router_logits, strict=True):
            layer += logits.tolist()
    return layers


def shares(tokens: list[list[float]]) -> list[float]:
    """Return each expert's share of the two that every token chooses among those that it may choose."""
    counts = [0] * 4
    for logits in tokens:
        allowed = [expert for expert in range(4) if expert != NEVER_CHOSEN]
        for expert in sorted(allowed, key=lambda e: logits[e])[-2:]:
            counts[expert] += 1
    return [count / (2 * len(tokens)) for count in counts]


def entropy(distribution: list[float]) -> float:
    """Return the entropy over its maximum."""
    return -sum(p * math.log(p) for p in distribution if p) / math.log(len(distribution))


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]


def check_balance(entry: dict, prefix: str, layer: int, load: list[float]) -> None:
    deviations = [(4 * share - 1) ** 2 for share in load]
    assert entry[f"{prefix}expert_load"][f"layer_{layer}"] == pytest.approx(load, abs=1e-12)
    assert entry[f"{prefix}max_vio/layer_{layer}"] == pytest.approx(4 * max(load) - 1)
    assert entry[f"{prefix}load_cv/layer_{layer}"] == pytest.approx(math.sqrt(sum(deviations) / 4))
    assert entry[f"{prefix}load_entropy/layer_{layer}"] == pytest.approx(entropy(load))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_loads_of_an_entry_are_those_of_its_steps(logged, model, number):
    rows = make_rows(8 * NUM_STEPS)
    entry = entries(logged)[number]
    for layer, tokens in zip(LAYERS, tokens_of(model, rows[16 * number : 16 * (number + 1)]), strict=True):
        check_balance(entry, "", layer, shares(tokens))
    assert entry["num_tokens"] == sum(len(row["input_ids"]) for row in rows[: 16 * (number + 1)])
    # No token since the beginning: two steps are not enough for an expert to be dead, four are.
    assert entry["dead_experts"] == 2 * entry["dead_experts/layer_1"] == (0 if number == 0 else 2)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_distributions_are_those_of_the_logged_step(logged, model, number):
    rows = make_rows(8 * NUM_STEPS)[16 * number + 8 : 16 * (number + 1)]
    entry = entries(logged)[number]
    for layer, tokens in zip(LAYERS, tokens_of(model, rows), strict=True):
        mean = sum(entropy(softmax(logits)) for logits in tokens) / len(tokens)
        assert entry[f"router_entropy/layer_{layer}"] == pytest.approx(mean, rel=1e-5)
        largest = max(abs(x) for logits in tokens for x in logits)
        assert entry[f"router_logit_max/layer_{layer}"] == pytest.approx(largest, rel=1e-5)


def test_attention_is_that_of_the_first_sequence_of_the_logged_step(logged, model):
    for number, entry in enumerate(entries(logged)):
        row = make_rows(8 * NUM_STEPS)[16 * number + 8]["input_ids"]
        with torch.no_grad():
            attentions = model(torch.tensor([row]), output_attentions=True, use_cache=False).attentions
        means = [weights[0, :, 1:, 0].mean().item() for weights in attentions]
        assert [entry[f"attention_sink/layer_{i}"] for i in range(4)] == pytest.approx(means, rel=1e-4)
        assert entry["attention_sink"] == pytest.approx(sum(means) / 4, rel=1e-4)


def test_gradients_by_family_are_those_of_the_logged_step(logged, model, folder):
    rows = make_rows(8 * NUM_STEPS)
    for number, entry in enumerate(entries(logged)):
        step = rows[16 * number + 8 : 16 * (number + 1)]
        num_items = sum(sum(label != -100 for label in row["labels"][1:]) for row in step)
        num_tokens = sum(len(row["input_ids"]) for row in step)
        model.zero_grad()
        for micro_batch in (step[:4], step[4:]):
            batch = CausalLMCollator(pad_token_id=0)(micro_batch)
            model(**batch, num_items_in_batch=num_items, num_tokens_in_batch=num_tokens).loss.backward()
        squares: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            square = parameter.grad.double().square().sum().item()
            squares[family_of(name)] = squares.get(family_of(name), 0.0) + square
        for family, square in squares.items():
            assert entry[f"grad_norm/{family}"] == pytest.approx(math.sqrt(square), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)


def test_biases_are_reported(logged):
    for entry in entries(logged):
        assert [entry[f"router_bias_min/layer_{i}"] for i in LAYERS] == [-9.0] * 2
        assert [entry[f"router_bias_max/layer_{i}"] for i in LAYERS] == [0.0] * 2


def test_evaluation_counts_every_row_once(logged, model):
    """Ten rows in batches of four, evaluated three times."""
    rows = make_rows(60)[50:]
    evaluations = [line for line in logged if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6, 6]
    for evaluation in evaluations:
        for layer, tokens in zip(LAYERS, tokens_of(model, rows), strict=True):
            check_balance(evaluation, "eval_", layer, shares(tokens))
            assert evaluation[f"eval_dead_experts/layer_{layer}"] == 1
        assert evaluation["eval_dead_experts"] == 2
        assert evaluation["eval_tokens"] == sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
        seen = make_rows(8 * NUM_STEPS)[: 8 * evaluation["step"]]
        assert evaluation["num_tokens"] == sum(len(row["input_ids"]) for row in seen)


def test_a_resumed_run_goes_on_counting(folder, logged):
    """From a checkpoint between two entries."""
    run(folder, "resumed", save_strategy="steps", save_steps=3)
    shutil.rmtree(folder / "resumed" / "checkpoint-6")
    (folder / "resumed" / "metrics.jsonl").unlink()
    lines = entries(run(folder, "resumed", resume_from_checkpoint="auto"))
    assert [line["step"] for line in lines] == [4, 6]
    for line, expected in zip(lines, entries(logged)[1:], strict=True):
        assert line["num_tokens"] == expected["num_tokens"]
    # Two steps without a token before the checkpoint, of which one was in no entry, and one after it.
    assert [line["dead_experts"] for line in lines] == [2, 2]


def test_every_epoch_is_logged_with_the_statistics_of_its_last_step(folder, model):
    """48 rows make six steps: an epoch and a half of four steps each."""
    rows = make_rows(32)
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = entries(run(folder, "epochs", logging_strategy="epoch", train_file=folder / "short.jsonl"))
    assert [line["step"] for line in lines] == [4, 6]
    for line, step in zip(lines, (rows[24:32], rows[8:16]), strict=True):
        largest = [max(abs(x) for logits in tokens for x in logits) for tokens in tokens_of(model, step)]
        assert [line[f"router_logit_max/layer_{i}"] for i in LAYERS] == pytest.approx(largest, rel=1e-5)
        assert "attention_sink" in line and "grad_norm/experts" in line


def test_only_logged_steps_are_measured(folder, monkeypatch):
    asked, hooks, forward = [], [], MoEForCausalLM.forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        asked.append(kwargs["output_router_statistics"])
        hooks.append(sum(len(m.tap._forward_hooks) for m in self.modules() if isinstance(m, MoEAttention)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MoEForCausalLM, "forward", watched)
    run(folder, "watched", max_steps=5, logging_first_step=True)
    assert asked == [True, True, True, True, False, False, True, True, False, False]
    assert hooks == [4, 0, 4, 0, 0, 0, 4, 0, 0, 0]


def test_memory_of_an_evaluation_does_not_grow(folder, monkeypatch):
    """Trainer keeps no predictions, because it hands them on step by step."""
    outputs = []
    loop = Trainer.evaluation_loop

    def watched(self, *args, **kwargs):
        outputs.append(loop(self, *args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(Trainer, "evaluation_loop", watched)
    run(folder, "memory", max_steps=1, do_eval=True)
    assert [(output.predictions, output.label_ids) for output in outputs] == [(None, None)]
