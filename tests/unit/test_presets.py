"""Every preset is a model of exactly its size, and, where it can be, one of Transformers' own."""

import json
import re
from dataclasses import fields
from importlib import resources

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_hf.presets
from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint import architectures
from moe_hf.errors import ConfigError
from moe_hf.presets import preset_names, read_preset
from moe_hf.presets.scaling import scaled_down

PRESETS = preset_names()

# Parameters in all, and those that one token uses.
COUNTS = {
    "quickstart": (4_625_344, 3_298_240),
    "gpt-5m": (5_212_928, 5_212_928),
    "gpt-40m": (41_690_624, 41_690_624),
    "gpt-124m": (123_588_864, 123_588_864),
    "gpt-350m": (350_408_704, 350_408_704),
    "moe-5m": (11_414_272, 5_221_120),
    "moe-40m": (91_268_608, 41_723_392),
    "moe-124m": (293_531_904, 123_662_592),
    "moe-350m": (945_147_904, 350_605_312),
    "small-1.3b": (1_313_461_248, 860_476_416),
    "medium-7b": (6_955_789_824, 4_690_865_664),
    "large-16b": (15_893_437_440, 10_372_684_800),
    "xlarge-70b": (70_284_172_288, 40_085_183_488),
    "fine-64e": (1_730_317_312, 170_036_224),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
}
DENSE = [name for name in PRESETS if name.startswith("gpt-")]

# The architecture of Transformers that each could be, where there is one.
COUNTERPARTS = {name: "qwen3" if name in DENSE else "qwen3_moe" for name in PRESETS}
COUNTERPARTS |= {"mixtral-8x7b": "mixtral", "olmoe-1b-7b": "olmoe", "fine-64e": None}

# config.json of mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924 and Qwen/Qwen3-30B-A3B.
PUBLISHED = {
    "mixtral-8x7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "olmoe-1b-7b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "attention_bias": False,
        "clip_qkv": None,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}

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


def on_meta(name: str) -> MoEForCausalLM:
    with torch.device("meta"):
        return MoEForCausalLM(MoEConfig(**read_preset(name)))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_exactly_its_size(name):
    model = on_meta(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    num_experts, k = model.config.num_experts, model.config.num_experts_per_tok
    experts = [
        p for layer in model.model.layers if hasattr(layer.mlp, "experts") for p in layer.mlp.experts.parameters()
    ]
    assert all(parameter.shape[0] == num_experts for parameter in experts)
    idle = sum((num_experts - k) * parameter[0].numel() for parameter in experts)
    assert (total, total - idle) == COUNTS[name]


def test_every_preset_has_a_size():
    assert sorted(COUNTS) == PRESETS


@pytest.mark.parametrize("size", ["5m", "40m", "124m", "350m"])
def test_dense_and_sparse_pairs_are_equal_but_for_the_experts(size):
    dense, sparse = read_preset(f"gpt-{size}"), read_preset(f"moe-{size}")
    assert dense["num_experts"] == 0 and (sparse["num_experts"], sparse["num_experts_per_tok"]) == (8, 2)
    about_experts = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
    about_experts |= {"router_aux_loss_coef", "router_z_loss_coef"}
    assert {k: v for k, v in sparse.items() if k not in about_experts} | {"num_experts": 0} == dense
    assert MoEConfig(**sparse).mlp_layer_types == ["sparse"] * dense["num_hidden_layers"]
    routers = dense["num_hidden_layers"] * 8 * dense["hidden_size"]
    assert COUNTS[f"moe-{size}"][1] - COUNTS[f"gpt-{size}"][1] == routers


@pytest.mark.parametrize("name", [name for name in PRESETS if re.match(r"(gpt|moe|small|medium|large|xlarge)-", name)])
def test_name_tells_the_size(name):
    """Of a pair after nanoGPT the active size, of the general ones the whole."""
    number, unit = re.fullmatch(r"\w+-([\d.]+)([mb])", name).groups()
    count = COUNTS[name][1 if name.startswith("moe-") else 0]
    assert count == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.05)


@pytest.mark.parametrize(
    ("name", "layers", "width", "sparse"),
    [
        ("small-1.3b", 12, 2048, [2, 4, 6, 8]),
        ("medium-7b", 30, 4096, range(2, 30, 3)),
        ("large-16b", 40, 5120, range(2, 40, 3)),
        ("xlarge-70b", 60, 8192, range(2, 60, 3)),
    ],
)
def test_a_third_of_the_layers_of_a_general_preset_is_sparse(name, layers, width, sparse):
    config = MoEConfig(**read_preset(name))
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (layers, width, 128)
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"] == list(sparse)
    # The two experts of a token are together as wide as the MLP of a dense layer.
    assert 2 * config.moe_intermediate_size == config.intermediate_size
    assert config.moe_intermediate_size % 256 == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_reference_is_the_published_architecture(name):
    native = CONFIG_MAPPING[COUNTERPARTS[name]](**PUBLISHED[name])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(native)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == COUNTS[name][0]
    assert {k: list(v.shape) for k, v in theirs.state_dict().items()} == {
        k: list(v.shape) for k, v in on_meta(name).state_dict().items()
    }
    # Their coefficient weighs one loss of all layers, which k of perfect balance makes k; ours that of each layer.
    expected = architectures.get(COUNTERPARTS[name]).to_moe_config(native)
    ours = MoEConfig(**read_preset(name))
    different = {f for f in MoEConfig.__annotations__ if getattr(ours, f) != getattr(expected, f)}
    # Tokens are the tokenizer's. A softmax over the two best logits is what scaling two of all to a sum of 1 gives.
    different -= {"pad_token_id", "bos_token_id", "eos_token_id"}
    assert different == ({"topk_before_softmax"} if name == "mixtral-8x7b" else set())


@pytest.mark.parametrize("values_of", [read_preset, lambda name: scaled_down(read_preset(name))], ids=["full", "twin"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_can_be_exported_as(name, values_of):
    config = MoEConfig(**values_of(name))
    if COUNTERPARTS[name] is None:
        with pytest.raises(ConfigError, match="attention_gate='elementwise' has no counterpart in qwen3_moe"):
            architectures.get("qwen3_moe").to_native_config(config)
    else:
        assert architectures.get(COUNTERPARTS[name]).to_native_config(config).model_type == COUNTERPARTS[name]


def test_fine_grained_preset_is_as_described():
    config = MoEConfig(**read_preset("fine-64e"))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (16, 1024, 50_304)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (64, 2, 512)
    assert (config.num_attention_heads, config.num_key_value_heads) == (16, 8)
    assert config.use_qk_norm and config.rms_norm_eps == 1e-5 and config.attention_gate and config.tie_word_embeddings
    assert set(config.mlp_layer_types) == {"sparse"} and config.expert_capacity_factor is None


@pytest.mark.parametrize("name", [name for name in PRESETS if COUNTERPARTS[name] == "qwen3_moe"])
def test_preset_could_be_a_qwen3_moe(name):
    """The same tensors under the same names give the same logits."""
    values = read_preset(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in Qwen3MoeForCausalLM(as_qwen3(values)).parameters())
    assert size == COUNTS[name][0]
    if size > 50_000_000:
        # The same kinds of layers, at a width that a test can multiply.
        values = scaled_down(values)
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
