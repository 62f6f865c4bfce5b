"""`MoEForCausalLM` computes what models of Transformers compute, forwards and backwards.

They are Mixtral, Qwen3-MoE and OLMoE, and with sigmoid scores GLM-4-MoE and dots.llm1.
"""

import functools

import pytest
import torch
from helpers_model import TINY, assert_close, gradients, randomize_vectors, tiny_config
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_hf import MoEForCausalLM

# Registered in Transformers and running on a CPU; its others ("deepgemm", "sonicmoe") need CUDA.
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "moe_hf")
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")

SHARED = {key: value for key, value in TINY.items() if key not in ("num_experts", "moe_intermediate_size")}
SHARED |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

SIGMOID = {"scoring_func": "sigmoid", "router_balancing": "loss_free"}

# For every reference: its class and configuration, and the `MoEConfig` changes that mean the same.
REFERENCES = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SHARED, num_local_experts=4, head_dim=12, rms_norm_eps=1e-5, rope_theta=1e6),
        {"moe_intermediate_size": 40, "head_dim": 12, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **{**SHARED, "num_experts_per_tok": 3}, num_experts=6, moe_intermediate_size=24, norm_topk_prob=True
        ),
        {"num_experts": 6, "num_experts_per_tok": 3, "use_qk_norm": True},
    ),
    "qwen3_moe_mixed_layers": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **{**SHARED, "num_hidden_layers": 5},
            num_experts=4,
            moe_intermediate_size=24,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            attention_bias=True,
        ),
        # Layers 1 and 3 by the step, and layer 3 is excepted.
        {
            "num_hidden_layers": 5,
            "moe_layer_indices": [1],
            "use_qk_norm": True,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig(**{**SHARED, "num_experts_per_tok": 3}, num_experts=6, rms_norm_eps=1e-6),
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": False,
            "use_qk_norm": True,
            "qk_norm_scope": "full",
        },
    ),
    "glm4_moe": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **{**SHARED, "num_hidden_layers": 3, "num_experts_per_tok": 3},
            head_dim=8,
            moe_intermediate_size=24,
            n_routed_experts=8,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            attention_bias=True,
            use_qk_norm=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            rms_norm_eps=1e-5,
        ),
        SIGMOID
        | {
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "shared_expert_intermediate_size": 48,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "attention_output_bias": False,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
        },
    ),
    "dots1": (
        Dots1ForCausalLM,
        Dots1Config(
            **SHARED,
            head_dim=8,
            moe_intermediate_size=24,
            n_routed_experts=6,
            n_shared_experts=1,
            norm_topk_prob=False,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        SIGMOID
        | {
            "num_experts": 6,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 24,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
}

# Ours to theirs; `{i}` is the layer.
ATTENTION_NAMES = {
    f"model.layers.{{i}}.self_attn.{x}_proj.weight": f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkvo"
}
ATTENTION_BIAS_NAMES = {
    f"model.layers.{{i}}.self_attn.{x}_proj.bias": f"model.layers.{{i}}.self_attn.{x}_proj.bias" for x in "qkvo"
}
QK_NORM_NAMES = {
    "model.layers.{i}.self_attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}
NORM_NAMES = {
    "model.layers.{i}.input_layernorm.weight": "model.layers.{i}.input_layernorm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "model.layers.{i}.post_attention_layernorm.weight",
}
SPARSE_NAMES = {
    "model.layers.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.experts.gate_up_proj": "model.layers.{i}.mlp.experts.gate_up_proj",
    "model.layers.{i}.mlp.experts.down_proj": "model.layers.{i}.mlp.experts.down_proj",
}
DENSE_NAMES = {
    "model.layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "model.layers.{i}.mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
}
SHARED_EXPERT_NAMES = {
    f"model.layers.{{i}}.mlp.shared_experts.{x}_proj.weight": f"model.layers.{{i}}.mlp.shared_experts.{x}_proj.weight"
    for x in ("gate", "up", "down")
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def name_map(config) -> dict[str, str]:
    names = dict(OUTER_NAMES)
    for i in range(config.num_hidden_layers):
        layer = {**ATTENTION_NAMES, **NORM_NAMES}
        layer |= ATTENTION_BIAS_NAMES if config.attention_bias else {}
        if not config.attention_output_bias:
            layer.pop("model.layers.{i}.self_attn.o_proj.bias", None)
        layer |= QK_NORM_NAMES if config.use_qk_norm else {}
        sparse = config.mlp_layer_types[i] == "sparse"
        layer |= SPARSE_NAMES if sparse else DENSE_NAMES
        layer |= SHARED_EXPERT_NAMES if sparse and config.shared_expert_intermediate_size else {}
        names |= {ours.format(i=i): theirs.format(i=i) for ours, theirs in layer.items()}
    return names


def copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module, names: dict[str, str]) -> None:
    assert set(names) == {name for name, _ in ours.named_parameters()}
    assert set(names.values()) == {name for name, _ in theirs.named_parameters()}
    with torch.no_grad():
        for our_name, their_name in names.items():
            assert ours.get_parameter(our_name).shape == theirs.get_parameter(their_name).shape
            ours.get_parameter(our_name).copy_(theirs.get_parameter(their_name))
    ours.load_state_dict(biases_of(theirs), strict=False)
    assert biases_of(ours).keys() == biases_of(theirs).keys()


def biases_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the routers' correction biases, which have the same names everywhere."""
    return {name: value for name, value in model.state_dict().items() if name.endswith("e_score_correction_bias")}


def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return logits, loss and every gradient for a batch whose second row ends in padding."""
    model.zero_grad()
    input_ids = torch.randint(TINY["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -3:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    inputs_embeds = model.get_input_embeddings()(input_ids)
    inputs_embeds.retain_grad()
    output = model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels)
    output.loss.backward()
    # What stands at padding is nobody's business, and the attention implementations differ there.
    result = {"logits": output.logits[attention_mask.bool()].detach(), "loss": output.loss.detach()}
    return result | {"inputs_embeds": inputs_embeds.grad} | gradients(model)


@functools.cache
def reference(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model_class, config, _ = REFERENCES[name]
    torch.manual_seed(0)
    theirs = model_class(config)
    randomize_vectors(theirs)
    for bias in biases_of(theirs).values():
        bias.copy_(0.3 * torch.randn(bias.shape) - 0.3)
    theirs.set_attn_implementation("eager")
    theirs.set_experts_implementation("eager")
    theirs.train()
    return theirs, run(theirs)


@pytest.mark.parametrize("experts", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_and_gradients_equal_the_reference_model(name, attention, experts):
    theirs, expected = reference(name)
    config = tiny_config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **REFERENCES[name][2])
    ours = MoEForCausalLM(config).train()
    names = name_map(config)
    copy_weights(ours, theirs, names)
    ours.set_attn_implementation(attention)
    ours.set_experts_implementation(experts)

    actual = run(ours)

    for key in ("logits", "loss", "inputs_embeds"):
        assert_close(actual[key], expected[key], 1e-5, key)
    for our_name, their_name in names.items():
        assert expected[their_name].abs().max() > 0, f"{their_name} has no gradient to compare with"
        assert_close(actual[our_name], expected[their_name], 1e-5, our_name)


ROPE_VARIANTS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope", ROPE_VARIANTS)
@torch.no_grad()
def test_every_rope_scaling_equals_mixtral(rope):
    parameters = {"rope_theta": 1000.0, **ROPE_VARIANTS[rope]}
    torch.manual_seed(0)
    mixtral = MixtralConfig(**SHARED, num_local_experts=4, head_dim=8, rope_parameters=dict(parameters))
    theirs = MixtralForCausalLM(mixtral)
    plain = tiny_config(moe_intermediate_size=40, rms_norm_eps=1e-5, rope_theta=1000.0)
    scaled = tiny_config(moe_intermediate_size=40, rms_norm_eps=1e-5, rope_parameters=dict(parameters))
    ours, unscaled = MoEForCausalLM(scaled), MoEForCausalLM(plain)
    for model in (ours, unscaled):
        copy_weights(model, theirs, name_map(scaled))
    # 80 positions are more than max_position_embeddings, and then few again: dynamic scaling grows and must shrink.
    long = torch.randint(TINY["vocab_size"], (1, 80), generator=torch.Generator().manual_seed(0))
    for input_ids in (long, long[:, :9]):
        assert_close(ours(input_ids).logits, theirs(input_ids).logits, 1e-5, rope)
    assert not torch.allclose(ours(long).logits, unscaled(long).logits, atol=1e-2)


def test_new_weights_have_the_configured_standard_deviation():
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(initializer_range=0.3, shared_expert_intermediate_size=16))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert abs(parameter.mean().item()) < 0.1, name
            assert 0.2 < parameter.std().item() < 0.4, name
