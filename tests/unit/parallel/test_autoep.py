"""What makes AutoEP take our model and our router, as far as one process can show it."""

import copy
import logging
from configparser import ConfigParser

import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import registry
from deepspeed.utils import logger as deepspeed_logger
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.parallel import autoep, versions
from moe_hf.parallel.autoep import autoep_layers, register_preset, split_expert_groups
from moe_hf.parallel.versions import require_supported
from moe_hf.routing import MoERouter
from moe_hf.training.bias_update import RouterBiasUpdater

TOKENS = torch.arange(3, 27).reshape(2, 12)
MASK = torch.ones_like(TOKENS).index_fill_(1, torch.tensor([9, 10, 11]), 0)


@pytest.fixture(autouse=True)
def presets_as_they_were(monkeypatch):
    """Begin without our preset, and leave DeepSpeed's registry as it was."""
    for name in ("PRESET_MODELS", "_PRESET_ADAPTERS"):
        entries = {key: value for key, value in getattr(registry, name).items() if key != "moe_hf"}
        monkeypatch.setattr(registry, name, entries)
    yield
    for each in list(deepspeed_logger.filters):
        deepspeed_logger.removeFilter(each)


def make_model(**changes) -> MoEForCausalLM:
    torch.manual_seed(1)
    return MoEForCausalLM(small_config(**changes)).eval()


def converter(model: MoEForCausalLM) -> AutoEP:
    return AutoEP(model, parse_autoep_config({"enabled": True, "autoep_size": 1}))


def set_biases(model: MoEForCausalLM) -> list[torch.Tensor]:
    """Give the routers' biases, where there are any, values that change many choices; return copies of them."""
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(4)))
    return [bias.clone() for bias in biases]


def convert(model: MoEForCausalLM) -> list[torch.nn.Parameter]:
    """Replace the sparse blocks as the engine does, and return the weights of the routers that AutoEP has made."""
    parser, weights = converter(model), []
    parser.replace_moe_layers(
        parser.ep_parser(),
        ep_size=1,
        ep_rank=0,
        on_moe_layer_replaced=lambda layer: weights.append(layer.router.gate.weight),
    )
    return weights


# --------------------------------------------------------------------------------------------------------------------
# The preset


def test_preset_and_adapter_are_in_place():
    with pytest.raises(ValueError, match="Unknown preset_model 'moe_hf'"):
        registry.get_preset("moe_hf")
    others = dict(registry.PRESET_MODELS)
    register_preset()
    preset = registry.get_preset("moe_hf")
    assert preset.hf_model_types == ("moe_hf",)
    assert registry.preset_name_for_hf_model_type("moe_hf") == "moe_hf"
    assert registry.get_preset_adapter(preset.preset_adapter) is not registry.get_preset_adapter("default")
    registry._validate_registered_preset_adapters()
    assert {name: value for name, value in registry.PRESET_MODELS.items() if name != "moe_hf"} == others


def test_registering_twice_changes_nothing():
    register_preset()
    names = list(registry.PRESET_MODELS), list(registry._PRESET_ADAPTERS)
    register_preset()
    assert (list(registry.PRESET_MODELS), list(registry._PRESET_ADAPTERS)) == names


@pytest.mark.parametrize("shared", [True, False])
def test_autoep_finds_exactly_the_sparse_layers(shared):
    register_preset()
    changes = {} if shared else {"shared_expert_intermediate_size": 0, "shared_expert_gate": False}
    specs = converter(make_model(num_experts=6, num_experts_per_tok=3, **changes)).ep_parser()
    assert [spec.moe_module_name for spec in specs] == ["model.layers.1.mlp", "model.layers.3.mlp"]
    for spec in specs:
        assert (spec.num_experts, spec.top_k, spec.hidden_size, spec.ffn_hidden_size) == (6, 3, 32, 24)
        assert (spec.score_func, spec.score_apply, spec.route_scale, spec.gate_bias) == ("softmax", "post", 1.0, False)
        assert spec.has_shared_experts == shared
        assert spec.shared_experts_gate_name == ("shared_experts_gate" if shared else "")


# --------------------------------------------------------------------------------------------------------------------
# The router


def test_converted_layers_route_with_our_router_and_autoeps_weight():
    register_preset()
    model = make_model()
    before = [model.model.layers[i].mlp.gate.weight.detach().clone() for i in (1, 3)]
    weights = convert(model)
    layers = dict(autoep_layers(model))
    assert list(layers) == ["model.layers.1.mlp", "model.layers.3.mlp"]
    for layer, weight, values in zip(layers.values(), weights, before, strict=True):
        assert isinstance(layer, AutoEPMoELayer) and type(layer.router) is MoERouter
        # Optimizer and ZeRO know parameters by identity.
        assert layer.router.weight is weight and torch.equal(weight, values)
    assert not list(autoep_layers(make_model()))


SIGMOID = {
    "scoring_func": "sigmoid",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "router_balancing": "loss_free",
}


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False, "routed_scaling_factor": 1.7}, SIGMOID])
def test_converted_model_gives_the_same_losses(changes):
    """Also when output recording has put its hooks on the routers before they were replaced."""
    register_preset()
    model = make_model(**changes)
    set_biases(model)
    arguments = {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS, "output_router_logits": True}
    arguments["output_hidden_states"] = True
    with torch.no_grad():
        expected = model(**arguments)
        convert(model)
        actual = model(**arguments)
    for name in ("logits", "loss", "layer_aux_losses", "layer_z_losses"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    assert len(actual.router_logits) == 2 and len(actual.hidden_states) == len(expected.hidden_states) == 5
    for ours, plain in zip(actual.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_converted_routers_take_the_bias_over_and_add_it_once():
    register_preset()
    model = make_model(**SIGMOID)
    before = set_biases(model)
    convert(model)
    layers = dict(autoep_layers(model))
    assert len(before) == len(layers) == 2
    for (name, layer), bias in zip(layers.items(), before, strict=True):
        # `expert_bias` is what the layer would add besides.
        assert layer.expert_bias is None
        assert torch.equal(layer.router.e_score_correction_bias, bias)
        assert f"{name}.router.e_score_correction_bias" in model.state_dict()
    assert sum("correction_bias" in name for name in model.state_dict()) == 2


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_the_bias_of_a_converted_model_stays_float32(cast):
    register_preset()
    model = make_model(**SIGMOID)
    before = set_biases(model)
    convert(model.to(cast))
    model.to(cast)
    for (_, layer), bias in zip(autoep_layers(model), before, strict=True):
        assert layer.router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(layer.router.e_score_correction_bias, bias)


def test_a_converted_model_counts_its_tokens_and_moves_its_biases():
    register_preset()
    models = [make_model(**SIGMOID).train() for _ in range(2)]
    convert(models[0])
    for model in models:
        set_biases(model)
        updater = RouterBiasUpdater(model)
        model(input_ids=TOKENS, attention_mask=MASK)
        assert model.assignment_counts.sum(dim=1).tolist() == [3 * MASK.sum()] * 2
        updater.step()
    converted, plain = ([m for m in model.modules() if isinstance(m, MoERouter)] for model in models)
    for ours, theirs in zip(converted, plain, strict=True):
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)


def test_autoep_does_not_warn_of_losses_that_our_router_computes():
    told = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    deepspeed_logger.addHandler(listener)
    about_another = "Layer 7: model has router_z_loss_coef=0.1, AutoEP router does not implement z-loss."
    try:
        register_preset()
        parser = converter(make_model(router_z_loss_coef=0.5))
        specs = parser.ep_parser()
        deepspeed_logger.warning("about something else")
        parser.replace_moe_layers(specs, ep_size=1, ep_rank=0)
        # From then on such a warning is about another model.
        deepspeed_logger.warning(about_another)
    finally:
        deepspeed_logger.removeHandler(listener)
    assert [text for text in told if "does not implement" in text] == [about_another]
    assert "about something else" in told


# --------------------------------------------------------------------------------------------------------------------
# Parameter groups


def make_optimizer(model: MoEForCausalLM) -> torch.optim.Optimizer:
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    shared = [p for name, p in model.named_parameters() if "shared" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name and "shared" not in name]
    return torch.optim.AdamW(
        [
            {"params": others, "weight_decay": 0.1, "lr": 3e-4},
            {"params": shared, "weight_decay": 0.2, "lr": 1e-4},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.8, 0.9),
    )


def settings(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in ("params", "moe", "name")}


def names_of(model: MoEForCausalLM, params: list[torch.nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in params]


def test_exactly_the_experts_move_and_every_setting_is_kept():
    model = make_model()
    optimizer = make_optimizer(model)
    before = copy.copy(optimizer.param_groups)
    old_settings = [settings(group) for group in before]
    split_expert_groups(optimizer, model, ep_size=2)
    dense, moe = optimizer.param_groups[:3], optimizer.param_groups[3:]
    assert [settings(group) for group in dense] == old_settings
    assert not any("moe" in group for group in dense)
    (group,) = moe
    assert group["moe"] is True and group["name"] == "ep_size_2"
    assert settings(group) == old_settings[0]
    assert names_of(model, group["params"]) == [
        f"model.layers.{i}.mlp.experts.{name}" for i in (1, 3) for name in ("gate_up_proj", "down_proj")
    ]
    every = [name for group in optimizer.param_groups for name in names_of(model, group["params"])]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())


def test_experts_of_every_group_keep_that_groups_settings():
    model = make_model()
    first = [p for name, p in model.named_parameters() if name.startswith("model.layers.1.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("model.layers.1.")]
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.5}, {"params": rest, "lr": 0.25}])
    split_expert_groups(optimizer, model, ep_size=4)
    moe = [group for group in optimizer.param_groups if group.get("moe")]
    assert [group["lr"] for group in moe] == [0.5, 0.25]
    assert [names_of(model, group["params"])[0].split(".")[2] for group in moe] == ["1", "3"]


@pytest.mark.parametrize(("bound", "ep_size"), [(10_000, 1), (5_000, 2), (6_144, 1), (1, 1)])
def test_groups_respect_the_bound_on_one_ranks_share(monkeypatch, bound, ep_size):
    monkeypatch.setattr(autoep, "_MAX_GROUP_SIZE", bound)
    model = make_model()
    optimizer = make_optimizer(model)
    split_expert_groups(optimizer, model, ep_size)
    moe = [group["params"] for group in optimizer.param_groups if group.get("moe")]
    sizes = [[p.numel() for p in params] for params in moe]
    # In order: 4 · 48 · 32 = 6144 and 4 · 32 · 24 = 3072 elements for each of two layers.
    assert sizes == ([[6144, 3072], [6144, 3072]] if bound * ep_size == 10_000 else [[6144], [3072], [6144], [3072]])
    moved = [name for params in moe for name in names_of(model, params)]
    assert moved == [name for name, _ in model.named_parameters() if ".experts." in name]


def test_size_of_a_partitioned_parameter_is_that_of_the_whole(monkeypatch):
    """At ZeRO 3 a parameter is empty, and says its size otherwise."""
    monkeypatch.setattr(autoep, "_MAX_GROUP_SIZE", 10_000)
    model = make_model()
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    optimizer = make_optimizer(model)
    split_expert_groups(optimizer, model, ep_size=1)
    assert [len(group["params"]) for group in optimizer.param_groups if group.get("moe")] == [2, 2]


def test_a_dense_model_has_no_expert_group():
    model = make_model(
        num_experts=0, decoder_sparse_step=1, shared_expert_intermediate_size=0, shared_expert_gate=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split_expert_groups(optimizer, model, ep_size=2)
    assert len(optimizer.param_groups) == 1


# --------------------------------------------------------------------------------------------------------------------
# Versions


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_installed_versions_have_all_integration_points(package):
    require_supported(package)
    installed = Version(__import__(package).__version__.split("+")[0])
    assert installed in versions.SUPPORTED[package]


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
@pytest.mark.parametrize(
    ("module", "names", "moved"),
    [
        ("json", ("loads", "read"), "json.read"),
        ("json.moved_away", ("loads",), "json.moved_away"),
    ],
)
def test_a_missing_name_is_told_in_one_sentence(monkeypatch, package, module, names, moved):
    points = {"logging": ("getLogger",), module: names}
    monkeypatch.setitem(versions._INTEGRATION_POINTS, package, points)
    with pytest.raises(ImportError) as error:
        require_supported(package)
    sentence = str(error.value)
    assert f"has moved {moved}, to which moe_hf attaches; install a version that works: " in sentence
    assert sentence.endswith("'.") and "\n" not in sentence
    requirement = sentence.partition("pip install '")[2].removesuffix("'.")
    assert requirement.startswith(package)
    named = SpecifierSet(requirement.removeprefix(package))
    assert {spec.operator for spec in named} == {">=", "<"}
    assert named == versions.SUPPORTED[package]


def test_range_is_that_of_the_installation(pytestconfig):
    setup = ConfigParser()
    setup.read(pytestconfig.rootpath / "setup.cfg")
    words = [line.split(maxsplit=1) for line in setup["options"]["install_requires"].splitlines()]
    required = {word[0]: SpecifierSet(word[1]) for word in words if word and word[0] in versions.SUPPORTED}
    assert required == versions.SUPPORTED
