"""`MoEForCausalLM.forward`: which losses there are, when, and that micro-batches add up."""

import math

import pytest
import torch
from helpers_model import (
    gradients,
    random_ids,
    reference_aux_loss,
    reference_route,
    reference_z_loss,
    tiny_config,
    tiny_model,
)

from moe_hf import MoEConfig, MoEForCausalLM, MoEModel

COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}


def padded_batch(seed: int = 0, lengths: tuple[int, ...] = (9, 5), left: bool = False) -> dict[str, torch.Tensor]:
    input_ids = random_ids(len(lengths), max(lengths), seed)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        attention_mask[row, slice(-length, None) if left else slice(length)] = 1
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def expected_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Return the summed cross-entropy of predicting each next label, and how many labels there were."""
    total, count = 0.0, 0
    for row, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, label in zip(row[:-1], row_labels[1:], strict=True):
            if label != -100:
                total += math.log(sum(math.exp(x) for x in scores)) - scores[label]
                count += 1
    return total, count


def expected_router_losses(router_logits: tuple, mask: torch.Tensor, top_k: int = 2) -> tuple[list, list]:
    """Return the balancing loss and the z-loss of every layer."""
    keep, aux, z = mask.flatten().tolist(), [], []
    for logits in router_logits:
        rows = logits.tolist()
        aux.append(reference_aux_loss(rows, [reference_route(row, top_k)[0] for row in rows], keep))
        z.append(reference_z_loss(rows, keep))
    return aux, z


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_loss_is_cross_entropy_plus_weighted_router_losses(training, left):
    model = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **COEFFICIENTS).train(training)
    batch = padded_batch(left=left)
    output = model(**batch, output_router_logits=True)

    total, count = expected_cross_entropy(output.logits, batch["labels"])
    aux, z = expected_router_losses(output.router_logits, batch["attention_mask"])
    assert len(aux) == 2
    assert output.ce_loss.item() == pytest.approx(total / count, rel=1e-5)
    assert output.layer_aux_losses.tolist() == pytest.approx(aux, rel=1e-5)
    assert output.layer_z_losses.tolist() == pytest.approx(z, rel=1e-5)
    # Sums over layers: a model of twice the depth balances each of its layers as hard.
    assert output.aux_loss.item() == pytest.approx(sum(aux), rel=1e-5)
    assert output.z_loss.item() == pytest.approx(sum(z), rel=1e-5)
    assert output.loss.item() == pytest.approx(total / count + 0.5 * sum(aux) + 0.25 * sum(z), rel=1e-5)


def test_loss_gradient_is_the_weighted_sum_of_its_parts():
    parts = {}
    for name in ("ce_loss", "output_z_loss", "aux_loss", "z_loss", "loss"):
        model = tiny_model(**COEFFICIENTS, output_z_loss_coef=0.125).train()
        model(**padded_batch(), label_smoothing=0.1)[name].backward()
        parts[name] = gradients(model)
    for name, gradient in parts["loss"].items():
        terms = [(1.0, "ce_loss"), (0.125, "output_z_loss"), (0.5, "aux_loss"), (0.25, "z_loss")]
        expected = sum(c * parts[term][name] for c, term in terms if parts[term][name] is not None)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)
    gate = "model.layers.0.mlp.gate.weight"
    assert all(parts[name][gate].abs().max() > 1e-3 for name in parts)


@pytest.mark.parametrize(
    "aux_coef, z_coef, extra", [(0.0, 0.0, "none"), (0.0, 0.25, "z_loss"), (0.5, 0.0, "aux_loss"), (0, 0, "none")]
)
def test_a_coefficient_of_zero_leaves_its_loss_out(aux_coef, z_coef, extra):
    model = tiny_model(router_aux_loss_coef=aux_coef, router_z_loss_coef=z_coef)
    batch = padded_batch()
    output = model(**batch)
    total, count = expected_cross_entropy(output.logits, batch["labels"])
    expected = total / count + (0.0 if extra == "none" else (aux_coef or z_coef) * output[extra].item())
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.aux_loss.item() > 0 and output.z_loss.item() > 0, "they still tell of the routing"


def test_a_model_without_sparse_layers_has_no_router_losses():
    model = tiny_model(num_experts=0, **COEFFICIENTS)
    batch = padded_batch()
    output = model(**batch)
    total, count = expected_cross_entropy(output.logits, batch["labels"])
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert output.aux_loss is None


def test_without_labels_there_is_no_loss():
    output = tiny_model(**COEFFICIENTS)(random_ids(2, 5))
    for name in ("loss", "ce_loss", "aux_loss", "z_loss", "layer_aux_losses", "layer_z_losses", "router_logits"):
        assert output[name] is None if name in output else getattr(output, name) is None


def test_the_router_losses_do_not_depend_on_output_router_logits():
    model, batch = tiny_model(**COEFFICIENTS), padded_batch()
    with torch.no_grad():
        losses = [model(**batch, output_router_logits=flag).loss for flag in (None, False, True)]
    assert losses[0] == losses[1] == losses[2]


def test_router_logits_are_returned_on_request_only():
    model, input_ids = tiny_model(**COEFFICIENTS), random_ids(2, 5)
    assert model(input_ids).router_logits is None
    assert model(input_ids, labels=input_ids).router_logits is None
    asked = model(input_ids, output_router_logits=True).router_logits
    assert [tuple(x.shape) for x in asked] == [(10, 4)] * 2
    model.config.output_router_logits = True
    assert len(model(input_ids).router_logits) == 2
    assert model(input_ids, output_router_logits=False).router_logits is None


def test_base_model_returns_router_choices_on_request():
    torch.manual_seed(0)
    model = MoEModel(tiny_config()).eval()
    output = model(random_ids(2, 5), output_router_logits=True, output_router_indices=True)
    for logits, indices in zip(output.router_logits, output.router_indices, strict=True):
        assert indices.tolist() == [reference_route(row, 2)[0] for row in logits.tolist()]


@pytest.mark.parametrize("left", [False, True])
def test_what_stands_at_padding_is_never_counted(left):
    model, batch = tiny_model(**COEFFICIENTS), padded_batch(left=left)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    padding = batch["attention_mask"] == 0
    other["input_ids"][padding] = (other["input_ids"][padding] + 7) % 61
    with torch.no_grad():
        first, second, unmasked = model(**batch), model(**other), model(batch["input_ids"], labels=batch["labels"])
    # Padded on the left, the first token is predicted from padding: cross-entropy there is as in all of Transformers.
    for name in ("aux_loss", "z_loss") if left else ("loss", "aux_loss", "z_loss"):
        assert second[name].item() == pytest.approx(first[name].item(), rel=1e-5)
        assert unmasked[name].item() != pytest.approx(first[name].item(), rel=1e-3)


def test_masked_labels_are_still_routed_tokens():
    """A prompt's tokens carry no label, but they load the experts."""
    model, batch = tiny_model(**COEFFICIENTS), padded_batch()
    prompt = batch["labels"].clone()
    prompt[:, :3] = -100
    with torch.no_grad():
        full, masked = model(**batch), model(**{**batch, "labels": prompt})
    assert masked.aux_loss == full.aux_loss and masked.z_loss == full.z_loss
    assert masked.ce_loss != full.ce_loss


def test_a_batch_of_padding_only_gives_finite_router_losses_and_gradients():
    model = tiny_model(**COEFFICIENTS).train()
    batch = padded_batch()
    batch["attention_mask"].zero_()
    output = model(**{**batch, "labels": batch["input_ids"]})
    assert output.aux_loss == 0.0 and output.z_loss == 0.0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_two_micro_batches_add_up_to_the_large_one():
    micro_batches = [padded_batch(0, (9, 5)), padded_batch(1, (2, 9))]
    large = {key: torch.cat([b[key] for b in micro_batches]) for key in micro_batches[0]}
    num_tokens = large["attention_mask"].sum()
    num_items = (large["labels"][:, 1:] != -100).sum()

    model = tiny_model(**COEFFICIENTS).train()
    shares = [model(**b, num_items_in_batch=num_items, num_tokens_in_batch=num_tokens) for b in micro_batches]
    alone = [tiny_model(**COEFFICIENTS)(**b, output_router_logits=True) for b in micro_batches]
    whole = tiny_model(**COEFFICIENTS)(**large)

    assert sum(s.ce_loss.item() for s in shares) == pytest.approx(whole.ce_loss.item(), rel=1e-5)
    assert sum(s.z_loss.item() for s in shares) == pytest.approx(whole.z_loss.item(), rel=1e-5)
    # A product of two means is not additive: each micro-batch is balanced by itself, weighted by its tokens.
    weighted_aux = 0.0
    for output, batch in zip(alone, micro_batches, strict=True):
        mask = batch["attention_mask"]
        weighted_aux += int(mask.sum()) / int(num_tokens) * sum(expected_router_losses(output.router_logits, mask)[0])
    assert sum(s.aux_loss.item() for s in shares) == pytest.approx(weighted_aux, rel=1e-5)
    total = whole.ce_loss.item() + 0.5 * weighted_aux + 0.25 * whole.z_loss.item()
    assert sum(s.loss.item() for s in shares) == pytest.approx(total, rel=1e-5)


def test_accumulated_gradients_equal_the_large_batch():
    """Without the balancing loss, which is no sum over tokens, gradients must agree as well."""
    micro_batches = [padded_batch(0, (9, 5)), padded_batch(1, (2, 9))]
    large = {key: torch.cat([b[key] for b in micro_batches]) for key in micro_batches[0]}
    num_tokens, num_items = large["attention_mask"].sum(), (large["labels"][:, 1:] != -100).sum()
    accumulated, whole = (tiny_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.25).train() for _ in range(2))
    for batch in micro_batches:
        accumulated(**batch, num_items_in_batch=num_items, num_tokens_in_batch=num_tokens).loss.backward()
    whole(**large).loss.backward()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(accumulated)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "training, scope, num_calls", [(True, "global", 1), (True, "local", 0), (False, "global", 0), (False, "local", 0)]
)
def test_statistics_are_reduced_only_while_training_in_the_global_scope(training, scope, num_calls):
    model = tiny_model(router_aux_loss_scope=scope, **COEFFICIENTS).train(training)
    ranks = [padded_batch(0, (9, 5)), padded_batch(1, (9, 2))]
    reported = []

    def report(statistics: torch.Tensor) -> torch.Tensor:
        reported.append(statistics)
        return statistics

    model.reduce_router_statistics = report
    alone = [model(**batch).aux_loss.item() for batch in ranks]
    assert len(reported) == 2 * num_calls
    model(ranks[0]["input_ids"])
    assert len(reported) == 2 * num_calls, "a forward pass without labels must not wait for other ranks"

    model.reduce_router_statistics = lambda _: sum(reported)
    together = [model(**batch).aux_loss.item() for batch in ranks]
    if num_calls == 0:
        assert together == alone
    else:
        whole = {key: torch.cat([batch[key] for batch in ranks]) for key in ranks[0]}
        output = tiny_model(**COEFFICIENTS)(**whole, output_router_logits=True)
        expected = sum(expected_router_losses(output.router_logits, whole["attention_mask"])[0])
        assert sum(together) / 2 == pytest.approx(expected, rel=1e-5)
        assert sum(alone) / 2 != pytest.approx(expected, rel=1e-3)


def test_loss_uses_the_new_vocabulary_after_resizing():
    model = tiny_model(**COEFFICIENTS)
    model.resize_token_embeddings(70, mean_resizing=False)
    batch = padded_batch()
    batch["input_ids"][0, 3] = batch["labels"][0, 3] = 69
    output = model(**batch)
    total, count = expected_cross_entropy(output.logits, batch["labels"])
    assert output.logits.shape[-1] == 70
    assert output.ce_loss.item() == pytest.approx(total / count, rel=1e-5)


def test_loss_comes_first_as_in_every_transformers_model():
    model, batch = tiny_model(**COEFFICIENTS), padded_batch()
    output = model(**batch)
    assert list(output)[:1] == ["loss"]
    assert output[0].shape == () and output[0] == output.loss
    assert model(**batch, return_dict=False)[0] == output.loss


def test_trainer_hands_only_logits_to_compute_metrics():
    """`Trainer.prediction_step` passes on every output but the loss and the keys that the config ignores."""
    output = tiny_model(**COEFFICIENTS)(**padded_batch())
    ignored = [*MoEConfig.keys_to_ignore_at_inference, "loss"]
    assert [key for key in output if key not in ignored] == ["logits"]


def test_forward_on_the_meta_device_gives_shapes():
    with torch.device("meta"):
        model = MoEForCausalLM(tiny_config())
        # The only experts implementation that runs on it, for Transformers' own models too.
        model.set_experts_implementation("batched_mm")
        assert model(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 61)


def test_a_token_that_pads_and_ends_texts_is_learned():
    model = MoEForCausalLM(tiny_config(pad_token_id=0, eos_token_id=0))
    tokens = torch.tensor([[5, 0, 7, 0, 9]])
    model(tokens, labels=tokens).loss.backward()
    assert model.model.embed_tokens.weight.grad[0].abs().sum() > 0
    assert model.model.embed_tokens.weight[0].norm() > 0
