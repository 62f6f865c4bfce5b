"""A model means the same in our words and in those of other architectures, or the translation says what it cannot."""

import copy
import itertools
from dataclasses import fields

import pytest
import torch
from native_models import NATIVES, load, logits, native_config, native_model, randomize, read_files
from small import small_config
from transformers import CONFIG_MAPPING

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint import architectures
from moe_hf.checkpoint.architectures.base import COMMON_FIELDS
from moe_hf.checkpoint.architectures.function import function_of, layer_pattern
from moe_hf.checkpoint.convert import write_native_folder
from moe_hf.errors import ConfigError


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --------------------------------------------------------------------------------------------------------------------
# The lists themselves


def test_every_architecture_has_a_name_and_a_case():
    assert set(architectures.names()) == {model_type for model_type, _ in NATIVES.values()}
    for name in architectures.names():
        assert architectures.get(name).model_type == name


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_named(name):
    with pytest.raises(ConfigError, match=f"{name} has multi-head latent attention, which moe_hf has not"):
        architectures.get(name)


def test_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match=r"'gpt2' cannot be converted; known are moe_hf, mixtral, qwen2_moe"):
        architectures.get("gpt2")


# Looked at together, or without any effect on a model of these classes.
WINDOW_FIELDS = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}


@pytest.mark.parametrize("model_type", architectures.names())
def test_every_field_of_the_other_configuration_has_a_place(model_type):
    """A field that Transformers adds turns this red: somebody has to think about what it means."""
    architecture, config_class = architectures.get(model_type), CONFIG_MAPPING[model_type]
    inherited = {field.name for field in fields(config_class.__mro__[1])} - {"tie_word_embeddings"}
    declared = {field.name for field in fields(config_class)} - inherited
    placed = {*COMMON_FIELDS, *architecture.carried, *architecture.neutral, *architecture.other_fields, "head_dim"}
    assert declared <= placed | WINDOW_FIELDS | {"pretraining_tp"}


# --------------------------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NATIVES)
def test_tensors_are_those_that_transformers_writes(tmp_path, name, dtype):
    model = native_model(name).to(dtype)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # `from_pretrained` keeps it so, `to` does not
    model.save_pretrained(tmp_path)
    architecture = architectures.get(model.config.model_type)
    expected = architecture.native_tensors(architecture.to_moe_config(model.config), dtype)
    written = read_files(tmp_path)
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {n: (t.shape, t.dtype) for n, t in written.items()}


def test_half_of_the_fused_matrix_is_the_gate():
    """Written out by hand, because a map that swaps both ways alike survives every round trip."""
    model = native_model("qwen2_moe")
    config = architectures.get("qwen2_moe").to_moe_config(model.config)
    tensors = architectures.get("qwen2_moe").tensors(config)
    numbers = {
        name: torch.full(tensor.shape, float(i)) for i, (name, tensor) in enumerate(tensors.native_tensors().items())
    }
    fused = tensors.read_moe("model.layers.2.mlp.experts.gate_up_proj", numbers.__getitem__, torch.float32)
    assert fused.shape == (6, 48, 32)
    for expert in range(6):
        prefix = f"model.layers.2.mlp.experts.{expert}"
        assert torch.equal(fused[expert, :24], numbers[f"{prefix}.gate_proj.weight"])
        assert torch.equal(fused[expert, 24:], numbers[f"{prefix}.up_proj.weight"])
        part = tensors.read_native(f"{prefix}.up_proj.weight", lambda name: fused)
        assert torch.equal(part, fused[expert, 24:]) and part.untyped_storage().nbytes() == part.nbytes


# --------------------------------------------------------------------------------------------------------------------
# What of theirs ours has not

REFUSED_BY_US = [
    ("llama", {"mlp_bias": True}, "mlp_bias=True of this llama model has no counterpart in moe_hf"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' must be one of 'silu'"),
    ("llama", {"attention_dropout": 1.5}, "attention_dropout=1.5 must be at least 0 and below 1"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 of this llama model"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} of this llama model"),
    ("llama", {"pad_token_id": 61}, "pad_token_id=61 must lie in the vocabulary"),
    ("mistral", {"sliding_window": 32}, "sliding_window=32 of this mistral model"),
    ("mixtral", {"sliding_window": 16}, "sliding_window=16 of this mixtral model"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 of this mixtral model"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 of this olmoe model"),
    ("olmoe", {"sliding_window": 16}, "sliding_window=16 of this olmoe model"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window=8 of this"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "sliding_window=8 of this"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 of this qwen2_moe model"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 of this qwen2_moe model"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_gate=True needs a shared expert"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 of this qwen3_moe model"),
    ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be between 1 and num_experts=6"),
    ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts=0 of this glm4_moe model"),
    ("glm4_moe", {"first_k_dense_replace": 3}, "first_k_dense_replace=3 of this glm4_moe model"),
    ("glm4_moe", {"n_group": 8}, "n_group=8 of this glm4_moe model"),
    ("dots1", {"sliding_window": 8, "max_window_layers": 1}, "sliding_window=8 of this dots1 model"),
    ("dots1", {"n_shared_experts": None}, "n_shared_experts=None of this dots1 model"),
    ("dots1", {"topk_group": 5}, "topk_group=5 must be between 1 and n_group=4"),
]


@pytest.mark.parametrize(
    ("name", "changes", "sentence"), REFUSED_BY_US, ids=[f"{n}-{next(iter(c))}" for n, c, _ in REFUSED_BY_US]
)
def test_what_ours_has_not_is_named(name, changes, sentence):
    native = native_config(name, **changes)
    with pytest.raises(ConfigError) as error:
        architectures.get(native.model_type).to_moe_config(native)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"pretraining_tp": 2}),
        ("mixtral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
        ("dots1", {"sliding_window": 8, "max_window_layers": 3}),
        ("glm4_moe", {"num_nextn_predict_layers": 1}),
        ("dots1", {"scoring_func": "noaux_tc", "moe_layer_freq": 1}),
    ],
)
def test_what_changes_nothing_is_let_through(name, changes):
    architecture = architectures.get(NATIVES[name][0])
    plain = architecture.to_moe_config(native_config(name))
    assert architecture.to_moe_config(native_config(name, **changes)).to_dict() == plain.to_dict()


def test_a_new_field_is_refused_when_it_is_used(monkeypatch):
    native = native_config("llama")
    monkeypatch.setitem(type(native).__dataclass_fields__, "softcap", copy.copy(fields(native)[0]))
    type(native).__dataclass_fields__["softcap"].name = "softcap"
    type(native).__dataclass_fields__["softcap"].default = None
    native.softcap = None
    assert architectures.get("llama").to_moe_config(native)
    native.softcap = 30.0
    with pytest.raises(ConfigError, match=r"softcap=30.0 of this llama model has no counterpart in moe_hf"):
        architectures.get("llama").to_moe_config(native)


# --------------------------------------------------------------------------------------------------------------------
# What of ours theirs has not

PLAIN = {"use_qk_norm": False, "shared_expert_intermediate_size": 0, "shared_expert_gate": False}
MIXTRAL = PLAIN | {"decoder_sparse_step": 1}
QWEN3_MOE = PLAIN | {"use_qk_norm": True}
QWEN2_MOE = {"use_qk_norm": False, "attention_bias": True, "attention_output_bias": False}
OLMOE = QWEN3_MOE | {"qk_norm_scope": "full", "decoder_sparse_step": 1}
DOTS1 = {
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 48,
    "shared_expert_gate": False,
    "scoring_func": "sigmoid",
    "router_balancing": "loss_free",
}
GLM4_MOE = DOTS1 | {"attention_output_bias": False}
LLAMA = MIXTRAL | {"num_experts": 0}
QWEN3 = LLAMA | {"use_qk_norm": True}
QWEN2 = LLAMA | {"attention_bias": True, "attention_output_bias": False}
OURS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "olmoe": OLMOE,
    "glm4_moe": GLM4_MOE,
    "dots1": DOTS1,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": QWEN3,
    "qwen2": QWEN2,
}

REFUSED_BY_THEM = [
    ("mixtral", {"attention_gate": "headwise"}, "attention_gate='headwise' has no counterpart in mixtral"),
    ("mixtral", {"use_qk_norm": True}, "use_qk_norm=True has no counterpart in mixtral"),
    ("mixtral", {"attention_bias": True}, "attention_bias=True has no counterpart in mixtral"),
    ("mixtral", {"attention_output_bias": True}, "attention_output_bias=True has no counterpart in mixtral"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False has no counterpart in mixtral"),
    (
        "mixtral",
        {"decoder_sparse_step": 2},
        "mlp_layer_types=['dense', 'sparse', 'dense', 'sparse'] has no",
    ),
    ("mixtral", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 has no counterpart in"),
    ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' has no counterpart in mixtral"),
    ("mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 has no counterpart in mixtral"),
    ("mixtral", {"n_group": 2}, "n_group=2 has no counterpart in mixtral"),
    ("mixtral", {"router_balancing": "loss_free"}, "router_balancing='loss_free' has no counterpart in mixtral"),
    ("mixtral", {"num_experts": 0}, "num_experts=0 has no counterpart in mixtral, where it must be at least 1"),
    ("mixtral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 has no counterpart in"),
    ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' has no counterpart in qwen3_moe"),
    ("qwen3_moe", {"qk_norm_scope": "full"}, "qk_norm_scope='full' has no counterpart in qwen3_moe"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm=False has no counterpart in qwen3_moe"),
    ("qwen3_moe", {"attention_output_bias": True}, "attention_output_bias=True has no counterpart in qwen3_moe"),
    ("qwen2_moe", {"shared_expert_gate": False}, "shared_expert_gate=False has no counterpart in qwen2_moe"),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 0, "shared_expert_gate": False},
        "shared_expert_intermediate_size=0 has no counterpart in qwen2_moe",
    ),
    ("qwen2_moe", {"head_dim": 12}, "head_dim=12 has no counterpart in qwen2_moe"),
    ("olmoe", {"head_dim": 12}, "head_dim=12 has no counterpart in olmoe"),
    ("olmoe", {"qk_norm_scope": "head"}, "qk_norm_scope='head' has no counterpart in olmoe"),
    ("olmoe", {"decoder_sparse_step": 2}, "mlp_layer_types=["),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func='softmax' has no counterpart in glm4_moe"),
    ("glm4_moe", {"shared_expert_intermediate_size": 40}, "shared_expert_intermediate_size=40 has no counterpart in"),
    ("glm4_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0 has no counterpart in"),
    ("glm4_moe", {"shared_expert_gate": True}, "shared_expert_gate=True has no counterpart in glm4_moe"),
    ("glm4_moe", {"attention_output_bias": True}, "attention_output_bias=True has no counterpart in glm4_moe"),
    ("glm4_moe", {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, "mlp_layer_types=["),
    ("glm4_moe", {"num_experts": 1, "num_experts_per_tok": 1}, "num_experts=1 has no counterpart in glm4_moe"),
    ("dots1", {"use_qk_norm": False}, "use_qk_norm=False has no counterpart in dots1"),
    ("dots1", {"n_group": 2, "group_scoring_func": "max"}, "group_scoring_func='max' has no counterpart in dots1"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm=True has no counterpart in llama"),
    ("llama", {"attention_output_bias": True}, "attention_output_bias=True has no counterpart in llama"),
    ("llama", {"num_experts": 4}, "num_experts=4 has no counterpart in llama"),
    ("llama", {"hidden_size": 30, "head_dim": 8}, "no counterpart in llama, export to moe_hf instead: "),
    ("mistral", {"attention_bias": True}, "attention_bias=True has no counterpart in mistral"),
    ("qwen2", {"attention_bias": False}, "attention_bias=False has no counterpart in qwen2"),
    ("qwen3", {"attention_gate": "elementwise"}, "attention_gate='elementwise' has no counterpart in qwen3"),
]


@pytest.mark.parametrize(
    ("model_type", "changes", "sentence"), REFUSED_BY_THEM, ids=[f"{n}-{next(iter(c))}" for n, c, _ in REFUSED_BY_THEM]
)
def test_what_theirs_has_not_is_named(model_type, changes, sentence):
    architecture = architectures.get(model_type)
    assert architecture.to_native_config(small_config(**OURS[model_type]))
    with pytest.raises(ConfigError) as error:
        architecture.to_native_config(small_config(**OURS[model_type] | changes))
    assert sentence in str(error.value) and "export to moe_hf instead" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {"router_balancing": "none", "router_z_loss_coef": 1.0, "router_aux_loss_scope": "local"}),
        ("mixtral", {"n_group": 2, "topk_group": 2, "group_scoring_func": "max"}),
        ("mixtral", {"qk_norm_scope": "full", "intermediate_size": 7}),
        ("llama", {"scoring_func": "sigmoid", "norm_topk_prob": False, "shared_expert_gate": False}),
        ("dots1", {"router_balancing": "none"}),
        ("dots1", {"n_group": 4, "topk_group": 4, "group_scoring_func": "max"}),
    ],
)
def test_what_has_no_say_is_not_asked_for(model_type, changes):
    architecture = architectures.get(model_type)
    config = small_config(**OURS[model_type] | changes)
    meant = function_of(architecture.to_moe_config(architecture.to_native_config(config)))
    assert {k: meant[k] for k in function_of(config)} == function_of(config)


def test_configuration_survives_both_ways():
    for name in NATIVES:
        native = native_config(name)
        architecture = architectures.get(native.model_type)
        config = architecture.to_moe_config(native)
        back = architecture.to_native_config(config)
        assert architecture.to_moe_config(back).to_dict() == config.to_dict(), name
        carried = {*COMMON_FIELDS, *architecture.carried, *architecture.other_fields} - {"num_mtp_layers"}
        for field in carried & native.to_dict().keys():
            if (name, field) != ("glm4_moe_biased", "num_nextn_predict_layers"):
                assert getattr(back, field) == getattr(native, field), (name, field)


@pytest.mark.parametrize("types", ["SSSS", "dSdS", "ddSS", "dddS", "SdSS", "Sddd", "dSdd", "ddSd"])
def test_every_pattern_of_layers_can_be_said_in_steps_and_exceptions(types):
    sparse = [i for i, kind in enumerate(types) if kind == "S"]
    step, exceptions = layer_pattern(sparse, len(types))
    assert sparse == [i for i in range(len(types)) if (i + 1) % step == 0 and i not in exceptions]


# --------------------------------------------------------------------------------------------------------------------
# The load-balancing loss


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe_normalized", "qwen3_moe", "olmoe"])
def test_balancing_loss_of_one_layer_weighs_the_same(name):
    theirs = native_model(name, num_hidden_layers=1, router_aux_loss_coef=0.7)
    architecture = architectures.get(theirs.config.model_type)
    config = architecture.to_moe_config(theirs.config)
    ours = MoEForCausalLM(config).eval()
    tensors, state = architecture.tensors(config, fused=True), theirs.state_dict()
    ours.load_state_dict({n: tensors.read_moe(n, state.__getitem__, torch.float32) for n in tensors.by_moe})
    ids = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(ids, labels=ids, output_router_logits=True)
        actual = ours(ids, labels=ids)
    assert expected.aux_loss * 0.7 > 0.1
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# Every combination of our fields: equal logits, or a refusal, never another model

CHOICES = {
    "attention": [
        {},
        {"attention_bias": True},
        {"attention_bias": True, "attention_output_bias": False},
        {"head_dim": 12},
        {"attention_gate": "headwise"},
    ],
    "norm": [{"use_qk_norm": False}, {"use_qk_norm": True}, {"use_qk_norm": True, "qk_norm_scope": "full"}],
    "layers": [
        {"num_experts": 0},
        {"decoder_sparse_step": 1},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 1, "first_k_dense_replace": 1},
    ],
    "router": [
        {},
        {"norm_topk_prob": False},
        {"scoring_func": "sigmoid"},
        {"scoring_func": "sigmoid", "router_balancing": "loss_free", "routed_scaling_factor": 2.5},
        {"scoring_func": "sigmoid", "router_balancing": "loss_free", "n_group": 2, "num_experts_per_tok": 1},
        {"router_balancing": "loss_free", "n_group": 2},
    ],
    "shared": [
        {},
        {"shared_expert_intermediate_size": 48},
        {"shared_expert_intermediate_size": 20, "shared_expert_gate": True},
    ],
    "rope": [{}, {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}],
}


def combinations() -> list[dict]:
    """Every choice with every other one of another group, the rest being the first; not all of the 2160 at once."""
    found = {}
    for first, second, third in itertools.combinations(CHOICES, 3):
        for picked in itertools.product(CHOICES[first], CHOICES[second], CHOICES[third]):
            values = dict(itertools.chain.from_iterable(choice.items() for choice in picked))
            if not {"use_qk_norm", "num_experts", "decoder_sparse_step"} & values.keys():
                values["use_qk_norm"] = True
            if values.get("num_experts") != 0 or not values.get("shared_expert_intermediate_size"):
                found[repr(sorted(values.items()))] = values
    return list(found.values())


def plain_config(changes: dict) -> MoEConfig:
    values = PLAIN | {"decoder_sparse_step": 1, "num_hidden_layers": 2, "initializer_range": 0.3} | changes
    return small_config(**copy.deepcopy(values))


@pytest.mark.parametrize("model_type", architectures.names())
def test_every_combination_gives_equal_logits_or_a_refusal(tmp_path, model_type):
    architecture, expressed = architectures.get(model_type), 0
    for number, changes in enumerate(combinations()):
        config = plain_config(changes)
        try:
            architecture.to_native_config(config)
        except ConfigError as error:
            assert "no counterpart" in str(error)
            continue
        torch.manual_seed(0)
        ours = MoEForCausalLM(config)
        randomize(ours)
        folder = tmp_path / str(number)
        folder.mkdir()
        write_native_folder(folder, architecture, config, torch.float32, ours.state_dict().__getitem__)
        theirs = load(folder, model_type)
        assert relative_error(logits(theirs), logits(ours)) <= 1e-5, changes
        expressed += 1
    # Wide enough to prove something, and not so tame that nothing is ever refused.
    assert 5 <= expressed <= number / 4
