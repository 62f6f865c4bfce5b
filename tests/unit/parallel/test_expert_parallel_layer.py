"""AutoEP's layer with our kernel gives what AutoEP's own gives; ranks that send rows are simulated in one process."""

import copy

import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, SplitPlan
from deepspeed.moe.ep_experts import GroupedExperts
from helpers_model import Dispatched
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.parallel import autoep, expert_parallel_layer
from moe_hf.parallel.expert_parallel_layer import ExpertParallelLayer, KernelExperts


@pytest.fixture(autouse=True)
def presets_as_they_were(monkeypatch):
    """Leave DeepSpeed's registry as it was."""
    for name in ("PRESET_MODELS", "_PRESET_ADAPTERS"):
        monkeypatch.setattr(autoep.registry, name, dict(getattr(autoep.registry, name)))
    autoep.register_preset()


@pytest.fixture
def layer() -> ExpertParallelLayer:
    """The first sparse layer of a converted model."""
    torch.manual_seed(1)
    model = MoEForCausalLM(small_config(num_experts=6))
    parser = AutoEP(model, parse_autoep_config({"enabled": True, "autoep_size": 1}))
    parser.replace_moe_layers(parser.ep_parser(), ep_size=1, ep_rank=0, on_moe_layer_replaced=lambda layer: None)
    return dict(autoep.autoep_layers(model))["model.layers.1.mlp"]


def as_autoep_made_it(layer: ExpertParallelLayer) -> AutoEPMoELayer:
    other = copy.deepcopy(layer)
    other.__class__, other.experts.__class__ = AutoEPMoELayer, GroupedExperts
    return other


def run(layer: AutoEPMoELayer) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    hidden_states = torch.randn(2, 13, 32, requires_grad=True)
    output = layer(hidden_states)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return gradients | {"output": output.detach(), "input": hidden_states.grad, "seen": layer.tokens_per_expert}


def test_equals_autoeps_own_layer(layer):
    assert type(layer) is ExpertParallelLayer and type(layer.experts) is KernelExperts
    expected = run(as_autoep_made_it(layer))
    for name, tensor in run(layer).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("setting", [{"async_split_plan": True}, {"score_apply": "pre"}])
def test_what_the_kernel_does_not_do_is_left_to_autoep(layer, setting):
    for name, value in setting.items():
        setattr(layer, name, value)
    expected = run(as_autoep_made_it(layer))
    assert layer._is_left_to_autoep()
    for name, tensor in run(layer).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("owner", "setting", "value"),
    [
        ("experts", "activation", "geglu_tanh"),
        ("experts", "use_grouped_mm", False),
        ("experts", "gate_up_impl", "fused"),
        ("layer", "combine_impl", "legacy_bmm"),
    ],
)
def test_layers_of_which_something_else_is_asked_stay_as_they_are(layer, owner, setting, value):
    other = as_autoep_made_it(layer)
    ExpertParallelLayer.take_over(other)
    assert type(other) is ExpertParallelLayer
    other = as_autoep_made_it(layer)
    setattr(other if owner == "layer" else other.experts, setting, value)
    ExpertParallelLayer.take_over(other)
    assert type(other) is AutoEPMoELayer and type(other.experts) is GroupedExperts


def test_rows_that_come_from_several_ranks_are_sorted_by_expert(layer, monkeypatch):
    """All experts are here, and the rows of two ranks: each its own, sorted by expert."""
    monkeypatch.setattr(expert_parallel_layer._AllToAllV, "apply", lambda group, rows, sent, received: rows)
    torch.manual_seed(3)
    counts = torch.tensor([[3, 0, 1, 2, 0, 4], [0, 5, 1, 0, 0, 2]], dtype=torch.int32)
    rows = torch.randn(int(counts.sum()), 32)
    plan = SplitPlan([10, 8], [10, 8], counts)
    experts = [expert for of_rank in counts.tolist() for expert, count in enumerate(of_rank) for _ in range(count)]
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    with torch.no_grad():
        pairs = list(zip(experts, rows, strict=True))
        expected = [w2[e] @ (torch.nn.functional.silu(w1[e] @ row) * (w3[e] @ row)) for e, row in pairs]
        torch.testing.assert_close(layer._visit(rows, plan), torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_fewer_operators_than_autoeps_own(layer):
    with Dispatched() as theirs:
        run(as_autoep_made_it(layer))
    with Dispatched() as ours:
        run(layer)
    assert len(ours.names) < 0.6 * len(theirs.names), (len(ours.names), len(theirs.names))
