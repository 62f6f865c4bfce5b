"""Gradient checkpointing (activation recomputation) must not change a loss, a router loss or a gradient."""

import pytest
import torch
from helpers_model import gradients, random_ids, tiny_model

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


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
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
