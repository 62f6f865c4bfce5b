"""Every parameter belongs to one family, under Hugging Face's name and under AutoEP's."""

import pytest
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.parameter_families import FAMILIES, family_of, is_router_weight

FAMILY = {
    "model.embed_tokens.weight": "embeddings",
    "model.layers.0.input_layernorm.weight": "norms",
    "model.layers.0.self_attn.q_proj.weight": "attention",
    "model.layers.0.self_attn.k_proj.bias": "attention",
    "model.layers.0.self_attn.o_proj.bias": "attention",
    "model.layers.0.self_attn.gate_proj.weight": "attention",
    "model.layers.0.self_attn.q_norm.weight": "norms",
    "model.layers.0.self_attn.k_norm.weight": "norms",
    "model.layers.0.post_attention_layernorm.weight": "norms",
    "model.layers.0.mlp.gate_proj.weight": "dense_mlp",
    "model.layers.0.mlp.down_proj.weight": "dense_mlp",
    "model.layers.1.mlp.gate.weight": "router",
    "model.layers.1.mlp.router.weight": "router",
    "model.layers.1.mlp.experts.gate_up_proj": "experts",
    "model.layers.1.mlp.experts.w1": "experts",
    "model.layers.1.mlp.experts.w2": "experts",
    "model.layers.1.mlp.experts.w3": "experts",
    "model.layers.1.mlp.experts.down_proj": "experts",
    "model.layers.1.mlp.shared_experts.gate_proj.weight": "dense_mlp",
    "model.layers.1.mlp.shared_experts.up_proj.weight": "dense_mlp",
    "model.layers.1.mlp.shared_experts_gate.weight": "dense_mlp",
    "model.norm.weight": "norms",
    "lm_head.weight": "embeddings",
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize(("name", "family"), FAMILY.items())
def test_family(name, family, prefix):
    assert family_of(prefix + name) == family


def test_every_parameter_of_a_model_has_one():
    config = small_config(attention_bias=True, attention_output_bias=True, attention_gate="elementwise")
    names = [name for name, _ in MoEForCausalLM(config).named_parameters()]
    assert {family_of(name) for name in names} == set(FAMILIES)
    for name in names:
        of_that_layer = name.replace("layers.2", "layers.0").replace("layers.3", "layers.1")
        assert family_of(name) == FAMILY.get(of_that_layer, family_of(of_that_layer))


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match=r"^model\.value_head\.weight belongs to none of the families attention, "):
        family_of("model.value_head.weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.gate.weight", True),
        ("model.layers.1.mlp.router.weight", True),
        ("model.layers.1.mlp.gate.e_score_correction_bias", False),
        ("model.layers.1.mlp.gate_proj.weight", False),
        ("model.layers.1.self_attn.gate_proj.weight", False),
        ("model.layers.1.mlp.shared_experts_gate.weight", False),
        ("model.layers.1.mlp.experts.w1", False),
    ],
)
def test_router_weights_are_no_other_gates_and_no_biases(name, expected):
    assert is_router_weight(name) == expected
