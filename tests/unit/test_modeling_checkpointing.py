"""Gradient checkpointing (activation recomputation) must not change a loss, a router loss or a gradient."""

import pytest
import torch
from helpers_model import gradients, random_ids, tiny_model
from torch.utils.checkpoint import noop_context_fn

from moe_hf.modeling_moe import MoEAttention

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

ENABLE = {
    "off": None,
    "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    # What a user gets who only asks for checkpointing: Trainer's default.
    "default": {},
}


def run(checkpointing: str, experts: str = "eager", loss_name: str = "loss") -> dict:
    """Return the outputs of one step in training mode, its gradients, and how often an attention ran."""
    model = tiny_model(
        first_k_dense_replace=1, num_hidden_layers=3, router_aux_loss_coef=0.5, router_z_loss_coef=0.1
    ).train()
    model.set_experts_implementation(experts)
    if ENABLE[checkpointing] is not None:
        model.gradient_checkpointing_enable(**ENABLE[checkpointing])
    num_calls = 0

    def count(*_) -> None:
        nonlocal num_calls
        num_calls += 1

    for module in model.modules():
        if isinstance(module, MoEAttention):
            module.register_forward_hook(count)
    input_ids = random_ids(2, 9)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0
    output = model(
        input_ids, attention_mask=attention_mask, labels=input_ids, use_cache=False, output_router_logits=True
    )
    num_router_logits = len(output.router_logits)
    output[loss_name].backward()
    return {
        "output": output,
        "gradients": gradients(model),
        "num_calls": num_calls,
        "num_router_logits": num_router_logits,
    }


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "moe_hf"])
@pytest.mark.parametrize("checkpointing", ["non-reentrant", "default"])
def test_checkpointing_changes_no_loss_and_no_gradient(checkpointing, experts):
    plain, checkpointed = run("off", experts), run(checkpointing, experts)
    assert (plain["num_calls"], checkpointed["num_calls"]) == (3, 6), "layers were not recomputed"
    assert checkpointed["num_router_logits"] == 2
    for name in ("loss", "ce_loss", "aux_loss", "z_loss", "layer_aux_losses", "layer_z_losses"):
        torch.testing.assert_close(checkpointed["output"][name], plain["output"][name], rtol=1e-6, atol=0.0)
    for name, gradient in plain["gradients"].items():
        torch.testing.assert_close(checkpointed["gradients"][name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("loss_name", ["aux_loss", "z_loss"])
@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "default"])
def test_router_losses_reach_every_router(checkpointing, loss_name):
    expected = run("off", loss_name=loss_name)["gradients"]
    actual = run(checkpointing, loss_name=loss_name)["gradients"]
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert actual[name].abs().max() > 1e-4, f"{loss_name} does not reach {name}"
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)
    # The last layer's router reads what the first layer wrote, so the loss goes all the way down.
    assert actual["model.layers.0.mlp.down_proj.weight"].abs().max() > 1e-6


METHODS = {
    "plain": {},
    "first the top-k": {"topk_before_softmax": True},
    "groups": {"num_experts": 8, "n_group": 4, "topk_group": 2},
    "loss_free": {"router_balancing": "loss_free", "scoring_func": "sigmoid"},
    "sinkhorn": {"router_balancing": "sinkhorn"},
    "position": {"expert_capacity_factor": 0.7, "token_drop_policy": "position"},
    "probability": {"expert_capacity_factor": 0.7, "token_drop_policy": "probability"},
    "noise": {"router_jitter_noise": 0.5, "expert_capacity_factor": 0.7},
    "expert_choice": {"router_balancing": "expert_choice"},
}


def choices_of_both_passes(changes: dict) -> tuple[list, list]:
    """Return what every router chose in the forward pass and in recomputation, which sees other inputs.

    The inputs are what sums in another order give, only more so; all that is equal before is equal after.
    """
    torch.manual_seed(0)
    model = tiny_model(num_hidden_layers=3, **changes).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    draw, seen = torch.Generator().manual_seed(1), {"forward": {}, "recomputation": {}}
    now = "forward"

    def disturb(module, args) -> tuple:
        return (args[0] + 0.3 * torch.randn(args[0].shape, generator=draw), *args[1:])

    def note(module, args, output) -> None:
        weights, index = output[:2]
        seen[now][id(module)] = (index.clone(), weights == 0)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(disturb)
        layer.mlp.gate.register_forward_hook(note)
    input_ids = random_ids(3, 16)
    loss = model(input_ids, labels=input_ids, use_cache=False).loss
    now = "recomputation"
    loss.backward()
    assert len(seen["forward"]) == len(seen["recomputation"]) == 3
    return tuple(list(seen[which][id(layer.mlp.gate)] for layer in model.model.layers) for which in seen)


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_takes_over_choices_and_drops(method):
    first, second = choices_of_both_passes(METHODS[method])
    for (index, dropped), (again, dropped_again) in zip(first, second, strict=True):
        assert torch.equal(index, again) and torch.equal(dropped, dropped_again)
    if "expert_capacity_factor" in METHODS[method]:
        assert any(dropped.any() for _, dropped in first)


@pytest.mark.parametrize("method", METHODS)
def test_without_that_recomputation_would_choose_anew(method, monkeypatch):
    monkeypatch.setattr("moe_hf.modeling_moe.keep_choices", noop_context_fn)
    first, second = choices_of_both_passes(METHODS[method])
    assert any(not torch.equal(index, again) for (index, _), (again, _) in zip(first, second, strict=True))


def test_recomputation_may_do_more_than_the_first_pass():
    """ZeRO-3 fetches weights that were there the first time, with operations of its own."""
    plain, model = (tiny_model(router_aux_loss_coef=0.5).train() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    model.gradient_checkpointing_enable()
    seen = set()

    def fetch(module, _) -> None:
        if module in seen:
            module.weight.detach().view(-1).sum()
        seen.add(module)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(fetch)
    ids = random_ids(2, 9)
    for each in (plain, model):
        each(ids, labels=ids, use_cache=False).loss.backward()
    assert len(seen) == model.config.num_hidden_layers
    for (name, grad), expected in zip(gradients(model).items(), gradients(plain).values(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9, msg=name)
