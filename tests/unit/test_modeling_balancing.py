"""`router_balancing`: what it adds to the loss, what is counted for the biases, and that these stay float32 on disk."""

import copy

import pytest
import torch
from helpers_model import gradients, random_ids, reference_z_loss, tiny_config, tiny_model
from oracle import choose_for_all
from safetensors.torch import load_file

from moe_hf import MoEForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

SIGMOID = {"scoring_func": "sigmoid", "num_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
NAMES = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]


def make_model(**changes) -> MoEForCausalLM:
    """Return a model of one dense and two sparse layers, whose biases are no multiples of anything in bfloat16."""
    model = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **(SIGMOID | COEFFICIENTS | changes))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def make_batch(seed: int = 0, lengths: tuple[int, ...] = (9, 5)) -> dict[str, torch.Tensor]:
    input_ids = random_ids(len(lengths), max(lengths), seed)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        attention_mask[row, :length] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


def expected_counts(model: MoEForCausalLM, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Count the unmasked tokens of every expert, from the logits and the biases."""
    keep = batch["attention_mask"].flatten().bool()
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(**batch, output_router_logits=True).router_logits
    counts = []
    for of_layer, name in zip(logits, NAMES, strict=True):
        chosen = choose_for_all(of_layer[keep], model.state_dict().get(name), model.config)
        experts = [expert for row in chosen for expert in row]
        counts.append([experts.count(expert) for expert in range(model.config.num_experts)])
    return counts


# --------------------------------------------------------------------------------------------------------------------
# The loss


def expected_aux_loss(model: MoEForCausalLM, batch: dict[str, torch.Tensor], router_logits: tuple) -> float:
    """Return `E * sum_i f_i * P_i`, summed over layers, expert by expert."""
    keep, total = batch["attention_mask"].flatten().bool(), 0.0
    for logits, counts in zip(router_logits, expected_counts(model, batch), strict=True):
        scores = torch.exp(logits[keep].double())
        if model.config.scoring_func == "sigmoid":
            scores = scores / (1 + scores)
        probs = scores / scores.sum(dim=1, keepdim=True)
        total += sum(8 * count / sum(counts) * probs[:, e].mean().item() for e, count in enumerate(counts))
    return total


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balancing, has_aux", [("aux_loss", True), ("loss_free", False), ("none", False)])
def test_only_aux_loss_adds_the_balancing_loss(balancing, has_aux, scoring_func):
    model, batch = make_model(router_balancing=balancing, scoring_func=scoring_func).train(), make_batch()
    output = model(**batch, output_router_logits=True)
    keep = batch["attention_mask"].flatten().tolist()
    z = sum(reference_z_loss(logits.tolist(), keep) for logits in output.router_logits)
    assert output.z_loss.item() == pytest.approx(z, rel=1e-5)
    aux = expected_aux_loss(model, batch, output.router_logits)
    assert output.aux_loss.item() == pytest.approx(aux, rel=1e-5)
    expected = output.ce_loss.item() + 0.25 * z + (0.5 * aux if has_aux else 0.0)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_loss_free_has_no_part_of_the_balancing_loss():
    batch = make_batch()
    large, none = (make_model(router_balancing="loss_free", router_aux_loss_coef=c).train() for c in (1e3, 0.0))
    for model in (large, none):
        model(**batch).loss.backward()
    for name, gradient in gradients(none).items():
        assert torch.equal(gradients(large)[name], gradient), name


@pytest.mark.parametrize("balancing", ["aux_loss", "loss_free", "sinkhorn", "expert_choice", "none"])
def test_without_coefficients_the_balance_is_only_reported(balancing):
    model = make_model(
        router_balancing=balancing, n_group=1, topk_group=1, router_aux_loss_coef=0.0, router_z_loss_coef=0.0
    )
    output = model(**make_batch())
    assert output.aux_loss.item() > 0
    assert output.loss.item() == output.ce_loss.item()


# --------------------------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize("checkpointing", [None, {}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}])
def test_every_token_of_training_is_counted_once(checkpointing):
    model = make_model(router_balancing="loss_free").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(**checkpointing)
    batches = [make_batch(0, (9, 5)), make_batch(1, (2, 9, 4))]
    expected = torch.zeros(2, 8, dtype=torch.int64)
    for batch in batches:
        expected += torch.tensor(expected_counts(model, batch))
        model(**batch, use_cache=False).loss.backward()
    assert model.assignment_counts.dtype == torch.int64
    assert model.assignment_counts.tolist() == expected.tolist()
    assert expected.sum(dim=1).tolist() == [3 * (9 + 5 + 2 + 9 + 4)] * 2
    assert not model.assignment_counts.requires_grad


def test_tokens_count_without_labels_and_without_router_losses():
    model = make_model(router_balancing="loss_free", router_z_loss_coef=0.0).train()
    batch = make_batch()
    del batch["labels"]
    output = model(**batch)
    assert model.assignment_counts.tolist() == expected_counts(model, make_batch())
    assert output.router_logits is None and output.loss is None


def test_without_a_mask_all_tokens_count():
    model = make_model(router_balancing="loss_free").train()
    model(make_batch()["input_ids"])
    assert model.assignment_counts.sum(dim=1).tolist() == [3 * 18] * 2


@pytest.mark.parametrize(
    "balancing, training, grad", [("loss_free", False, True), ("loss_free", True, False), ("aux_loss", True, True)]
)
def test_nothing_else_is_counted(balancing, training, grad):
    model = make_model(router_balancing=balancing).train(training)
    with torch.set_grad_enabled(grad):
        model(**make_batch())
    assert model.assignment_counts is None


def test_a_dense_model_has_neither_biases_nor_counts():
    model = tiny_model(num_experts=0, router_balancing="loss_free").train()
    model(**make_batch()).loss.backward()
    assert model.assignment_counts is None
    assert not [name for name in model.state_dict() if "bias" in name]


def test_counts_are_no_part_of_the_model():
    model = make_model(router_balancing="loss_free").train()
    names = list(model.state_dict())
    model(**make_batch())
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_leave_the_biases_alone(checkpointing):
    model = make_model(router_balancing="loss_free").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = {name: model.state_dict()[name].clone() for name in NAMES}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**make_batch(), use_cache=False).loss.backward()
    optimizer.step()
    model.eval()(**make_batch())
    for name in NAMES:
        assert torch.equal(model.state_dict()[name], before[name])
        assert not model.get_buffer(name).requires_grad


# --------------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("balancing", ["aux_loss", "loss_free", "none"])
def test_biases_are_there_with_loss_free_only_and_begin_at_zero(balancing):
    model = MoEForCausalLM(tiny_config(num_hidden_layers=3, first_k_dense_replace=1, router_balancing=balancing))
    biases = {name: value for name, value in model.state_dict().items() if name.endswith("bias")}
    assert list(biases) == (NAMES if balancing == "loss_free" else [])
    for value in biases.values():
        assert value.shape == (4,) and value.dtype == torch.float32 and not value.any()


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_saving_and_loading_leave_every_bit_of_the_biases(saved, loaded, tmp_path):
    model = make_model(router_balancing="loss_free")
    before = {name: model.state_dict()[name].clone() for name in NAMES}
    model.to(saved).save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    again = MoEForCausalLM.from_pretrained(tmp_path, dtype=loaded)
    for name in NAMES:
        for value in (on_disk[name], again.state_dict()[name]):
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])
            assert not torch.equal(value.bfloat16().float(), value)
    assert again.model.layers[1].mlp.gate.weight.dtype == (saved if loaded == "auto" else loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_biases_gets_zeros_when_it_is_to_have_them(dtype, tmp_path):
    make_model(router_balancing="aux_loss").save_pretrained(tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path, router_balancing="loss_free", dtype=dtype)
    for name in NAMES:
        assert model.state_dict()[name].dtype == torch.float32 and not model.state_dict()[name].any()


def test_a_new_model_in_bfloat16_has_float32_biases():
    config = tiny_config(num_hidden_layers=3, first_k_dense_replace=1, router_balancing="loss_free")
    model = MoEForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert [model.state_dict()[name].dtype for name in NAMES] == [torch.float32] * 2


def test_a_cast_changes_no_choice_by_its_bias():
    """In bfloat16 the router sees rounded tokens and weights, but chooses by them with the same biases."""
    model = make_model(router_balancing="loss_free").bfloat16()
    seen = []
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output[1])))
    with torch.no_grad():
        model(**make_batch())
    [(tokens, index)] = seen
    logits = tokens.float() @ gate.weight.float().T
    assert index.tolist() == choose_for_all(logits, gate.e_score_correction_bias, model.config)
