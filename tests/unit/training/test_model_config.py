"""From a preset, a file or a folder, with overrides, to the configuration that is meant."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from native_models import native_model
from safetensors.torch import load_file, save_file

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint import source
from moe_hf.errors import ConfigError
from moe_hf.presets import read_preset
from moe_hf.training.arguments import ModelArguments
from moe_hf.training.model_config import build_config, check_weights, local_model, make_config, parse_overrides

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 32,
}
YAML_FLOATS = "YAML 1.1 takes a number such as 1e-6, without a dot, for text"


def configure(source: str = "quickstart", **arguments) -> MoEConfig:
    return build_config(ModelArguments(config_name=str(source), **arguments))


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a configuration, or a model with it, and returns the folder."""

    def save(with_weights: bool = False, **changes) -> str:
        config = MoEConfig(**(SMALL | changes))
        folder = tmp_path / "saved"
        (MoEForCausalLM(config) if with_weights else config).save_pretrained(folder)
        return str(folder)

    return save


# --------------------------------------------------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("num_experts=8", {"num_experts": 8}),
        (" num_experts = 8 , use_qk_norm=true,", {"num_experts": 8, "use_qk_norm": True}),
        ("head_dim=None,num_key_value_heads=None", {"head_dim": None, "num_key_value_heads": None}),
        ("mlp_layer_types=[dense,sparse],num_experts=4", {"mlp_layer_types": ["dense", "sparse"], "num_experts": 4}),
        ("moe_layer_indices=[0, 2]", {"moe_layer_indices": [0, 2]}),
        ("eos_token_id=[1,2]", {"eos_token_id": [1, 2]}),
        ("router_aux_loss_coef=1e-3,rms_norm_eps=1E-5", {"router_aux_loss_coef": 1e-3, "rms_norm_eps": 1e-5}),
        ("rope_theta=1e6", {"rope_theta": 1e6}),
        ("router_z_loss_coef=0", {"router_z_loss_coef": 0}),
        ("qk_norm_scope=full,attention_gate=headwise", {"qk_norm_scope": "full", "attention_gate": "headwise"}),
        (
            "rope_parameters={rope_type: yarn, factor: 2.0, rope_theta: 5000.0},hidden_size=32",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5000.0}, "hidden_size": 32},
        ),
        (
            'rope_parameters={"rope_type": "linear", "factor": 4}',
            {"rope_parameters": {"rope_type": "linear", "factor": 4}},
        ),
    ],
)
def test_overrides_are_read_by_the_types_of_the_fields(text, expected):
    overrides = parse_overrides(text)
    assert overrides == expected
    assert [type(value) for value in overrides.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    "mapping", ["{rope_type: linear, rope_theta: 1e6}", '{"rope_type": "linear", "rope_theta": 1e6}']
)
def test_floats_inside_a_mapping_are_floats(mapping):
    assert parse_overrides(f"rope_parameters={mapping}")["rope_parameters"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("head_dim", "config_overrides: 'head_dim' is not of the form name=value."),
        ("num_expert=8", "config_overrides: num_expert is not a field of MoEConfig; did you mean num_experts?"),
        ("zzz=8", "config_overrides: zzz is not a field of MoEConfig."),
        ("rms_norm_eps=tiny", "config_overrides: rms_norm_eps=tiny is not a number."),
        ("num_experts=8;num_hidden_layers=2", "'num_experts' expected int, got str"),
        ("num_experts=2.5", "'num_experts' expected int, got float"),
        ("num_experts=None", "'num_experts' expected int, got NoneType"),
        ("mlp_layer_types=[dense", "'mlp_layer_types'"),
        ("use_qk_norm=2", "'use_qk_norm' expected bool, got int"),
    ],
)
def test_wrong_overrides_are_refused_with_a_sentence(text, sentence):
    with pytest.raises(ConfigError) as error:
        configure(config_overrides=text)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_flags_win_over_the_list_of_overrides():
    config = configure(config_overrides="num_experts=16,hidden_size=96,router_z_loss_coef=0.5", num_experts=4)
    assert (config.num_experts, config.hidden_size, config.router_z_loss_coef) == (4, 96, 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 6),
        ("num_experts_per_tok", 3),
        ("decoder_sparse_step", 4),
        ("hidden_size", 128),
        ("num_hidden_layers", 6),
        ("router_aux_loss_coef", 0.0),
        ("router_z_loss_coef", 0.5),
    ],
)
def test_every_model_flag_reaches_its_field(name, value):
    config = configure(**{name: value})
    assert getattr(config, name) == value != read_preset("quickstart")[name]


def test_zero_experts_make_a_dense_model():
    config = configure(num_experts=0)
    assert config.num_sparse_layers == 0 and config.mlp_layer_types == ["dense"] * 4


def test_rope_base_alone_and_together_with_a_scaling(saved):
    assert configure(config_overrides="rope_theta=1e5").rope_parameters["rope_theta"] == 1e5
    both = configure(config_overrides="rope_theta=1e5,rope_parameters={rope_type: linear, factor: 2.0}").rope_parameters
    assert both == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}
    folder = saved(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0})
    config = configure(folder, config_overrides="rope_theta=7.0")
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}


# --------------------------------------------------------------------------------------------------------------------
# Which layers are sparse


def kinds(config: MoEConfig) -> str:
    return "".join("S" if kind == "sparse" else "d" for kind in config.mlp_layer_types)


def test_shorthand_of_a_preset_follows_its_flags():
    assert kinds(configure()) == "dSdS"
    assert kinds(configure(num_hidden_layers=6)) == "dSdSdS"
    assert kinds(configure(num_hidden_layers=6, decoder_sparse_step=3)) == "ddSddS"
    assert kinds(configure(config_overrides="first_k_dense_replace=2,decoder_sparse_step=1")) == "ddSS"
    assert kinds(configure(config_overrides="moe_layer_indices=[0,3],decoder_sparse_step=1")) == "SddS"


def test_layer_types_of_a_saved_configuration_are_derived_again(saved):
    folder = saved(decoder_sparse_step=2)
    assert json.loads(Path(folder, "config.json").read_text())["mlp_layer_types"] == ["dense", "sparse"] * 2
    assert kinds(configure(folder)) == "dSdS"
    assert kinds(configure(folder, num_hidden_layers=6)) == "dSdSdS"
    assert kinds(configure(folder, decoder_sparse_step=4)) == "dddS"
    assert kinds(configure(folder, num_experts=0)) == "dddd"
    assert kinds(configure(folder, num_experts=8)) == "dSdS"


def test_dense_saved_configuration_becomes_sparse(saved):
    folder = saved(num_experts=0)
    assert kinds(configure(folder)) == "dddd"
    assert kinds(configure(folder, num_experts=4)) == "SSSS"


def test_explicit_list_of_a_saved_configuration_is_kept(saved):
    folder = saved(mlp_layer_types=["sparse", "dense", "dense", "sparse"])
    assert kinds(configure(folder, num_experts=8)) == "SddS"
    assert kinds(configure(folder, hidden_size=32)) == "SddS"
    with pytest.raises(ConfigError, match="mlp_layer_types has 4 entries but num_hidden_layers=6"):
        configure(folder, num_hidden_layers=6)
    assert kinds(configure(folder, decoder_sparse_step=2)) == "dSdS"


def test_one_way_to_name_the_sparse_layers_replaces_another():
    assert kinds(configure(config_overrides="mlp_layer_types=[sparse,sparse,dense,dense]")) == "SSdd"
    assert kinds(configure(config_overrides="moe_layer_indices=[0]")) == "Sddd"
    with pytest.raises(ConfigError, match="contradicts"):
        configure(config_overrides="mlp_layer_types=[sparse,sparse,dense,dense],decoder_sparse_step=4")
    assert (
        kinds(configure(config_overrides="mlp_layer_types=[sparse,sparse,dense,dense],decoder_sparse_step=1")) == "SSdd"
    )


# --------------------------------------------------------------------------------------------------------------------
# Sources


def test_preset_is_exactly_its_keyword_arguments():
    expected, config = MoEConfig(**read_preset("quickstart")), configure()
    assert config.to_dict() == expected.to_dict()
    assert config.num_experts == 8 and config.vocab_size == 4096


@pytest.mark.parametrize("extension", ["json", "yaml", "yml"])
def test_configuration_file_holds_keyword_arguments(tmp_path, extension):
    path = tmp_path / f"mine.{extension}"
    values = SMALL | {"moe_layer_indices": [1, 3], "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    path.write_text(json.dumps(values) if extension == "json" else yaml.safe_dump(values))
    config = configure(path, num_experts_per_tok=1)
    assert config.to_dict() == MoEConfig(**values, num_experts_per_tok=1).to_dict()
    assert kinds(config) == "dSdS"


def test_yaml_configuration_may_write_floats_as_python_does(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("router_z_loss_coef: 1e-3\nrms_norm_eps: 1e-5\nrope_parameters: {rope_theta: 1e6}\n")
    config = configure(path)
    assert (config.router_z_loss_coef, config.rms_norm_eps) == (1e-3, 1e-5)
    assert config.rope_parameters["rope_theta"] == 1e6


def test_flag_wins_over_the_other_name_of_its_field(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("num_local_experts: 4\n")
    assert configure(path).num_experts == 4
    assert configure(path, num_experts=16).num_experts == 16
    assert configure(path, num_experts=8).num_experts == 8


def test_folder_of_a_saved_model_gives_its_configuration(saved):
    folder = saved(with_weights=True, num_experts=3, router_aux_loss_coef=0.25)
    config = build_config(ModelArguments(model_name_or_path=folder))
    assert (config.num_experts, config.router_aux_loss_coef, config.hidden_size) == (3, 0.25, 16)
    changed = build_config(ModelArguments(model_name_or_path=folder, router_aux_loss_coef=0.5))
    assert (changed.num_experts, changed.router_aux_loss_coef) == (3, 0.5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "Neither --config_name nor --model_name_or_path is given; name a preset (fine-64e, gpt-124m"),
        ({"config_name": "quickstart", "model_name_or_path": "x"}, "both name a configuration; give one of them."),
        ({"config_name": "quikstart"}, "is neither a preset nor a .json or .yaml file; did you mean quickstart?"),
        ({"config_name": "zzz"}, "is neither a preset nor a .json or .yaml file; there are fine-64e, gpt-124m"),
        ({"config_name": "absent.yaml"}, "--config_name absent.yaml: there is no such file."),
        ({"model_name_or_path": "absent"}, "absent is not a folder with a config.json and weights."),
    ],
)
def test_missing_sources_are_refused_with_a_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        build_config(ModelArguments(**arguments))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.yaml", "num_experts: [", "cannot be read: while parsing"),
        ("a.json", '{"num_experts": 4', "cannot be read: Expecting"),
        ("a.json", "[4]", "must hold one mapping of MoEConfig's fields."),
        ("a.yaml", "", "must hold one mapping of MoEConfig's fields."),
        ("a.json", '{"model_type": "mixtral"}', "describes a 'mixtral' model, not a 'moe_hf' one."),
        ("a.json", '{"num_expert": 4}', "num_expert=4 is not a field of MoEConfig; did you mean num_experts?"),
        ("a.json", '{"num_experts": "4"}', "'num_experts' expected int, got str"),
        ("a.json", '{"num_experts": 4, "num_experts_per_tok": 5}', "num_experts_per_tok=5 must be between 1 and"),
    ],
)
def test_wrong_files_are_refused_with_a_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        configure(tmp_path / name)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_make_config_keeps_the_sentence_of_the_configuration():
    with pytest.raises(ConfigError, match=r"^hidden_size=15 is not divisible by num_attention_heads=2; "):
        make_config(SMALL | {"hidden_size": 15})


# --------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_the_model_pass(saved, tied):
    folder = saved(with_weights=True, tie_word_embeddings=tied)
    check_weights(folder, build_config(ModelArguments(model_name_or_path=folder)))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "model.layers.2.mlp.gate.weight",
            None,
            "lacks model.layers.2.mlp.gate.weight, which its moe_hf configuration",
        ),
        ("lm_head.weight", None, "lacks lm_head.weight, which its moe_hf configuration asks for."),
        (
            "model.norm.weight",
            torch.ones(17),
            "has model.norm.weight of shape (17,), but its configuration says (16,).",
        ),
        ("model.layers.4.mlp.gate.weight", torch.ones(4, 16), "holds model.layers.4.mlp.gate.weight, which its moe_hf"),
    ],
)
def test_weights_of_another_model_are_refused(saved, name, change, sentence):
    folder = saved(with_weights=True)
    tensors = load_file(f"{folder}/model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    save_file(tensors, f"{folder}/model.safetensors")
    with pytest.raises(ConfigError) as error:
        check_weights(folder, build_config(ModelArguments(model_name_or_path=folder)))
    assert str(error.value).startswith(f"--model_name_or_path {folder} {sentence}")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"hidden_size": 32}, "model.embed_tokens.weight has shape [64, 16] instead of [64, 32]"),
        ({"num_hidden_layers": 5}, "model.layers.4.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 3}, "model.layers.3.self_attn.q_proj.weight is not part of it"),
        ({"config_overrides": "use_qk_norm=true"}, "model.layers.0.self_attn.q_norm.weight is missing"),
    ],
)
def test_flags_that_make_another_model_are_refused(saved, flags, sentence):
    folder = saved(with_weights=True)
    config = build_config(ModelArguments(model_name_or_path=folder, **flags))
    with pytest.raises(ConfigError) as error:
        check_weights(folder, config)
    assert str(error.value) == (
        f"--model_name_or_path {folder} does not fit the model: {sentence}; "
        "leave out the flags that change its configuration."
    )


def test_correction_bias_may_begin_but_not_end(saved):
    folder = saved(with_weights=True)
    arguments = ModelArguments(model_name_or_path=folder, config_overrides="router_balancing=loss_free")
    check_weights(folder, build_config(arguments))
    folder = saved(with_weights=True, router_balancing="loss_free")
    arguments = ModelArguments(model_name_or_path=folder, config_overrides="router_balancing=aux_loss")
    with pytest.raises(ConfigError, match=r"mlp\.gate\.e_score_correction_bias is not part of it"):
        check_weights(folder, build_config(arguments))


def test_damaged_and_missing_weights_are_refused(saved):
    folder = saved(with_weights=True)
    arguments = ModelArguments(model_name_or_path=folder)
    path = f"{folder}/model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match=r"^--model_name_or_path .*model\.safetensors is damaged"):
        check_weights(folder, build_config(arguments))
    other = f"{folder}/other"
    MoEConfig(**SMALL).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors file, so there are no weights in it"):
        check_weights(other, build_config(ModelArguments(model_name_or_path=other)))
    torch.save({}, f"{other}/pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has its weights in pytorch_model\.bin, a pickle, which can run code"):
        check_weights(other, build_config(ModelArguments(model_name_or_path=other)))


# --------------------------------------------------------------------------------------------------------------------
# Models of other architectures


def test_folder_of_another_architecture_gives_our_configuration(tmp_path):
    native_model("qwen3_moe_mixed").save_pretrained(tmp_path)
    config = build_config(ModelArguments(model_name_or_path=str(tmp_path), router_aux_loss_coef=0.5))
    assert (config.num_experts, config.use_qk_norm, config.router_aux_loss_coef) == (6, True, 0.5)
    assert kinds(config) == "dSdddS" and config.eos_token_id == [4, 5]
    check_weights(str(tmp_path), config)
    deeper = build_config(ModelArguments(model_name_or_path=str(tmp_path), decoder_sparse_step=2))
    with pytest.raises(ConfigError, match=r"model\.layers\.3\.mlp\.gate\.weight is missing; leave out the flags"):
        check_weights(str(tmp_path), deeper)


def test_all_sparse_layers_of_another_architecture_follow_the_number_of_layers(tmp_path):
    native_model("mixtral").save_pretrained(tmp_path)
    config = build_config(ModelArguments(model_name_or_path=str(tmp_path), num_hidden_layers=2))
    assert kinds(config) == "SS"


def test_feature_that_ours_has_not_is_named(tmp_path):
    native_model("olmoe", clip_qkv=8.0).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^clip_qkv=8\.0 of this olmoe model has no counterpart in moe_hf"):
        build_config(ModelArguments(model_name_or_path=str(tmp_path)))


def test_model_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    native_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", lambda name, **options: str(tmp_path))
    assert local_model("org/name") == str(tmp_path)
    assert build_config(ModelArguments(model_name_or_path="org/name")).num_experts == 0
    with pytest.raises(ConfigError, match="--model_name_or_path absent is not a folder with a config"):
        local_model("absent")
