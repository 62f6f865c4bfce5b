"""Saved activations against what autograd really saves, tensor by tensor, in our layers and in AutoEP's."""

from itertools import accumulate

import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from torch.profiler import ProfilerActivity, profile

from moe_hf import MoEConfig, MoEForCausalLM, linear_cross_entropy
from moe_hf.parallel import autoep
from moe_hf.parallel.zero_settings import zero_settings
from moe_hf.planning import activations
from moe_hf.planning.activations import activation_amounts, saved_by_layer
from moe_hf.planning.setting import Setting

TOKENS = 192
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 160,
    "intermediate_size": 352,
    "moe_intermediate_size": 208,
    "num_hidden_layers": 1,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 24,
    "num_experts_per_tok": 3,
}
LAYERS = {
    "dense": {"num_experts": 0},
    "norms and gate": {"num_experts": 0, "use_qk_norm": True, "attention_gate": "elementwise"},
    "full norms": {"num_experts": 0, "use_qk_norm": True, "qk_norm_scope": "full", "attention_gate": "headwise"},
    "sparse": {"num_experts": 8},
    "shared": {"num_experts": 8, "shared_expert_intermediate_size": 120, "shared_expert_gate": True},
}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.fixture(autouse=True)
def presets_as_they_were(monkeypatch):
    """Leave DeepSpeed's registry as it was."""
    for name in ("PRESET_MODELS", "_PRESET_ADAPTERS"):
        monkeypatch.setattr(autoep.registry, name, dict(getattr(autoep.registry, name)))


def setting(item_size: int = 2, ep_size: int = 0, **others) -> Setting:
    zero = zero_settings({"zero_optimization": {"stage": 2}}, SHAPE["hidden_size"])
    return Setting(1, zero, ep_size, item_size=item_size, sequence_length=TOKENS, **others)


def make_model(changes: dict, item_size: int, in_autoep: bool) -> MoEForCausalLM:
    config = MoEConfig(**SHAPE | changes)
    model = MoEForCausalLM._from_config(config, attn_implementation="sdpa")
    if in_autoep:
        autoep.register_preset()
        parser = AutoEP(model, parse_autoep_config({"enabled": True, "autoep_size": 1}))
        parser.replace_moe_layers(parser.ep_parser(), ep_size=1, ep_rank=0, on_moe_layer_replaced=lambda layer: None)
    return model.to(DTYPES[item_size]).train()


def bytes_saved(model: MoEForCausalLM, run) -> int:
    """Add up the storages that autograd keeps, but for weights, and cosines and sines, which all layers share."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(known)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize(
    ("kind", "in_autoep"), [*((kind, False) for kind in LAYERS), ("sparse", True), ("shared", True)]
)
def test_layer_saves_what_is_predicted(kind, in_autoep, item_size):
    model = make_model(LAYERS[kind], item_size, in_autoep)

    def run(known: set[int]) -> None:
        hidden = torch.randn(1, TOKENS, SHAPE["hidden_size"], dtype=DTYPES[item_size], requires_grad=True)
        positions = model.model.rotary_emb(hidden, position_ids=torch.arange(TOKENS)[None])
        known.update(tensor.untyped_storage().data_ptr() for tensor in positions)
        model.model.layers[0](hidden, attention_mask=None, position_embeddings=positions)

    trained = setting(item_size, ep_size=int(in_autoep))
    predicted = saved_by_layer(model.config, trained, sparse=model.config.num_experts > 0)
    assert predicted == pytest.approx(bytes_saved(model, run), rel=0.02)


def peak_bytes(run) -> int:
    """Return the most bytes that are allocated at one time, inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("width", [208, 640])
@pytest.mark.parametrize(("kind", "in_autoep"), [("dense", False), ("sparse", False), ("sparse", True)])
def test_backward_pass_of_a_layer_needs_what_is_estimated(kind, in_autoep, width):
    """What is saved, and the gradients of activations beside it; those of weights are counted elsewhere."""
    sizes = {"intermediate_size": width, "moe_intermediate_size": width}
    model = make_model(LAYERS[kind] | sizes, 2, in_autoep)
    hidden = torch.randn(1, 4 * TOKENS, SHAPE["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(hidden, position_ids=torch.arange(4 * TOKENS)[None])

    def run() -> None:
        model.model.layers[0](hidden, attention_mask=None, position_embeddings=positions).sum().backward()

    peak = peak_bytes(run)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    amounts = activation_amounts(model.config, setting(ep_size=int(in_autoep), micro_batch=4))
    (estimate,) = [a.bytes for a in amounts if a.name == "one layer, backward"]
    if kind == "dense":
        assert estimate == pytest.approx(peak - gradients, rel=0.05)
    else:  # on a CPU, one expert's rows at a time
        assert 0.6 * estimate <= peak - gradients <= estimate


def test_head_never_holds_all_logits():
    config = MoEConfig(**SHAPE | {"vocab_size": 50_000, "num_experts": 0})
    amounts = {a.name: a.bytes for a in activation_amounts(config, setting(micro_batch=64))}
    logits = 2 * 64 * TOKENS * config.vocab_size
    assert "the head" in amounts and sum(amounts.values()) < logits
    assert activations.MAX_LOGITS == linear_cross_entropy._MAX_LOGITS
    # The gradient of the head's weight is kept from the forward pass on, in FP32.
    assert amounts["saved by the head"] > 4 * config.vocab_size * config.hidden_size


def test_checkpointing_keeps_the_inputs_of_layers_only():
    config = MoEConfig(**SHAPE | LAYERS["sparse"] | {"num_hidden_layers": 12})
    kept, whole = (
        sum(a.bytes for a in activation_amounts(config, setting(checkpointing=checkpointing)))
        for checkpointing in (True, False)
    )
    inputs = 2 * TOKENS * SHAPE["hidden_size"] * 12
    assert inputs < kept < 0.4 * whole
