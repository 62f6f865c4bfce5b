"""Every preset is a model that trains, and one that Transformers' Qwen3-MoE could be."""

import json
from dataclasses import fields
from importlib import resources

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_hf.presets
from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.errors import ConfigError
from moe_hf.presets import preset_names, read_preset

PRESETS = preset_names()

# What both configurations call the same, and which `MoEConfig` fields choose the layers.
QWEN3_NAMES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "attention_bias",
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "rope_parameters",
}
LAYER_NAMES = {"decoder_sparse_step", "first_k_dense_replace", "moe_layer_indices", "mlp_layer_types"}
# Losses change no output; Qwen3-MoE always normalises queries and keys.
TRAINING_NAMES = {"router_aux_loss_coef", "router_aux_loss_scope", "router_z_loss_coef", "use_qk_norm"}


def sparse_layers(values: dict) -> set[int]:
    """Return the sparse layers by the rules of the fields' descriptions."""
    layers = range(values["num_hidden_layers"])
    if "mlp_layer_types" in values:
        return {i for i in layers if values["mlp_layer_types"][i] == "sparse"}
    if "moe_layer_indices" in values:
        return set(values["moe_layer_indices"])
    step, first = values.get("decoder_sparse_step", 1), values.get("first_k_dense_replace", 0)
    return {i for i in layers if i >= first and (i + 1) % step == 0}


def as_qwen3(values: dict) -> Qwen3MoeConfig:
    """Translate a preset; whatever Qwen3-MoE has no word for ends in an assertion."""
    assert values.keys() <= QWEN3_NAMES | LAYER_NAMES | TRAINING_NAMES
    assert values["use_qk_norm"]
    dense = sorted(set(range(values["num_hidden_layers"])) - sparse_layers(values))
    shared = {name: value for name, value in values.items() if name in QWEN3_NAMES}
    defaults = {"norm_topk_prob": True, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return Qwen3MoeConfig(**(defaults | shared), decoder_sparse_step=1, mlp_only_layers=dense)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_exactly_keyword_arguments(name):
    values = read_preset(name)
    declared = {field.name for field in fields(MoEConfig)}
    assert values.keys() <= declared - {"model_type", "architectures", "auto_map", "transformers_version"}
    config = MoEConfig(**values)
    assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds(name):
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig(**read_preset(name)))
    assert all(parameter.is_meta for parameter in model.parameters())
    config = model.config
    assert config.num_sparse_layers > 0 and len(config.mlp_layer_types) == config.num_hidden_layers


def test_quickstart_has_its_size():
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig(**read_preset("quickstart")))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_625_344


@pytest.mark.parametrize("name", PRESETS)
def test_preset_could_be_a_qwen3_moe(name):
    """The same tensors under the same names give the same logits."""
    values = read_preset(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in Qwen3MoeForCausalLM(as_qwen3(values)).parameters())
        assert size == sum(p.numel() for p in MoEForCausalLM(MoEConfig(**values)).parameters())
    if size > 50_000_000:
        # The same kinds of layers, at a width that a test can multiply.
        values |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
        values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    theirs = Qwen3MoeForCausalLM(as_qwen3(values)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Large enough for the experts' share of the logits to be seen.
            parameter.normal_(std=0.08) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    ours = MoEForCausalLM(MoEConfig(**values)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = torch.randint(values["vocab_size"], (2, 33))
    with torch.no_grad():
        expected = theirs(ids).logits
        error = (ours(ids).logits - expected).abs().max() / expected.abs().max()
        assert error < 1e-5
        for layer in ours.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.down_proj.zero_()
        assert (ours(ids).logits - expected).abs().max() / expected.abs().max() > 1e-2


def test_every_json_file_is_a_preset():
    files = [file.name for file in resources.files(moe_hf.presets).iterdir() if file.name.endswith(".json")]
    assert sorted(f"{name}.json" for name in PRESETS) == sorted(files)
    assert "quickstart" in PRESETS and sorted(PRESETS) == PRESETS
    assert read_preset("quickstart") == json.loads((resources.files(moe_hf.presets) / "quickstart.json").read_text())


def test_unknown_preset_is_refused_with_a_sentence():
    with pytest.raises(
        ConfigError, match=r"^--config_name quikstart is neither a preset .*; did you mean quickstart\?$"
    ):
        read_preset("quikstart")
    with pytest.raises(ConfigError, match=r"there are .*quickstart.*\.$"):
        read_preset("zzz")
    with pytest.raises(ConfigError):
        read_preset("../presets/quickstart")
