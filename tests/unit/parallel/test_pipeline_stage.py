"""A stage computes and holds its part of the whole model: the same weights, outputs, losses and gradients."""

import pytest
import torch
from small import small_config
from torch import nn

from moe_hf import MoEForCausalLM
from moe_hf.parallel.pipeline_layout import PipelineLayout
from moe_hf.parallel.pipeline_module import _AddLoss
from moe_hf.parallel.pipeline_stage import PipelineStage, fill_randomly

# Layers 1 and 3 are sparse.
LAYOUT = PipelineLayout((0, 2, 4), data_parallel_size=1)
DENSE_FIRST = PipelineLayout((0, 1, 4), data_parallel_size=1)
LOSS_FREE = {"router_balancing": "loss_free", "scoring_func": "sigmoid", "shared_expert_gate": False}
GATED = {"attention_bias": True, "attention_gate": "headwise"}
KINDS = [{"output_z_loss_coef": 0.03}, {"tie_word_embeddings": True}, LOSS_FREE, GATED]
OPTIONS = {"num_items_in_batch": 25.0, "num_tokens_in_batch": 40.0, "output_router_statistics": True}


def whole_model(**changes) -> MoEForCausalLM:
    torch.manual_seed(5)
    return MoEForCausalLM._from_config(small_config(**changes), dtype=torch.float32)


def stages(model: MoEForCausalLM, layout: PipelineLayout = LAYOUT) -> list[PipelineStage]:
    made = [PipelineStage(model.config, layout, stage) for stage in range(2)]
    for stage in made:
        stage.load(lambda name: model.state_dict()[name].clone())
    return made


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (2, 12))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 9:], labels[1, 9:], labels[0, :4] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(made: list[PipelineStage], batch: dict, **options) -> list:
    options |= OPTIONS
    first = made[0].run(batch, batch["input_ids"], **options)
    return [first, made[1].run(batch, _AddLoss.apply(first.logits, first.loss), **options)]


@pytest.mark.parametrize("changes", KINDS)
def test_random_weights_are_those_of_one_process(changes):
    """Also the numbers that are drawn afterwards."""
    model, after = whole_model(**changes), torch.rand(3)
    expected = model.state_dict()
    for number in range(2):
        torch.manual_seed(5)
        stage = PipelineStage(model.config, LAYOUT, number)
        fill_randomly(stage)
        assert torch.equal(torch.rand(3), after)
        held = stage.state_dict()
        assert not any(tensor.is_meta for tensor in [*held.values(), *stage.buffers()])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())


@pytest.mark.parametrize("changes", KINDS)
def test_stages_hold_every_tensor_once(changes):
    model = whole_model(**changes)
    held = [set(stage.state_dict()) for stage in stages(model)]
    assert held[0] | held[1] == set(model.state_dict()) and not held[0] & held[1]
    assert all(LAYOUT.stage_of(name) == number for number in range(2) for name in held[number])


@pytest.mark.parametrize("changes", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_model(changes, batch):
    model = whole_model(**changes).train()
    made = [stage.train() for stage in stages(model)]
    expected = model(**batch, skip_logits=True, **OPTIONS, label_smoothing=0.1)
    expected.loss.backward()
    first, last = run(made, batch, label_smoothing=0.1)
    last.loss.backward()

    torch.testing.assert_close(first.loss + last.loss, expected.loss)
    torch.testing.assert_close(last.ce_loss, expected.ce_loss)
    assert first.ce_loss == 0 and first.output_z_loss is None
    if expected.output_z_loss is not None:
        torch.testing.assert_close(last.output_z_loss, expected.output_z_loss)
    own = {name: parameter.grad for stage in made for name, parameter in stage.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = own[name]
        if name == "model.embed_tokens.weight" and "tie_word_embeddings" in changes:
            gradient = gradient + own["lm_head.weight"]
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_routing_is_told_by_the_stage_that_has_the_router(batch):
    """A stage of dense layers has nothing to tell, and counts no assignments."""
    model = whole_model(**LOSS_FREE).train()
    made = [stage.train() for stage in stages(model, DENSE_FIRST)]
    first, last = run(made, batch)
    expected = model(**batch, skip_logits=True, **OPTIONS)
    for name in ("tokens_per_expert", "router_entropy", "layer_z_losses", "layer_aux_losses"):
        assert getattr(first, name) is None
        torch.testing.assert_close(getattr(last, name), getattr(expected, name))
    assert made[0].assignment_counts is None
    assert torch.equal(made[1].assignment_counts, model.assignment_counts)


def test_only_what_is_needed_is_read():
    model, read = whole_model(tie_word_embeddings=True), []

    def note(name: str) -> torch.Tensor:
        read.append(name)
        return model.state_dict()[name]

    PipelineStage(model.config, LAYOUT, 1).load(note)
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.")) for name in read)
    assert "model.embed_tokens.weight" in read and "lm_head.weight" not in read, "saved models have the tied one once"


def test_evaluation_gives_the_cross_entropy_of_each_sequence(batch):
    model = whole_model().eval()
    with torch.no_grad():
        _, last = run([stage.eval() for stage in stages(model)], batch)
        expected = model(**batch, skip_logits=True, **OPTIONS)
    torch.testing.assert_close(last.sequence_ce_losses, expected.sequence_ce_losses)


def test_dropout_of_embeddings_happens_once(batch):
    model = whole_model(hidden_dropout=0.5)
    first, last = stages(model)
    assert (first.model.config.hidden_dropout, last.model.config.hidden_dropout) == (0.5, 0.0)
    assert all(layer.hidden_dropout == 0.5 for layer in [*first.model.layers, *last.model.layers])


def test_stages_without_ends_have_none():
    first, last = stages(whole_model())
    assert first.model.embed_tokens is not None and isinstance(first.lm_head, nn.Identity)
    assert last.model.embed_tokens is None and not isinstance(last.lm_head, nn.Identity)
