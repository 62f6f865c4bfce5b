"""A model folder is told from headers alone: sizes counted by hand, whatever is lost is named, nothing is executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers_model import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig, ViTModel

from moe_hf.checkpoint import description as module
from moe_hf.checkpoint.description import ModelSize, describe_model, read_config, size_of
from moe_hf.checkpoint.export import export_model
from moe_hf.errors import CheckpointError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
# Model type, its own fields, sparse layers, width of one expert.
NATIVE = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 2, 40),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
        1,
        24,
    ),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}, 2, 24),
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 3}, 2, 40),
    "glm4_moe": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
        1,
        24,
    ),
    "llama": ({}, 0, 0),
    "qwen3": ({"tie_word_embeddings": True, "head_dim": 8}, 0, 0),
}


def save_native(folder: Path, model_type: str, **options) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | NATIVE[model_type][0])))
    model.save_pretrained(folder, **options)
    return model


def make_folder(folder: Path, model_type: str) -> None:
    if model_type == "moe_hf":
        export_model(tiny_model(), folder)
    else:
        save_native(folder, model_type)


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_parameters_are_those_counted_by_hand():
    """Hidden 32, 4 heads of 8, 2 key-value heads; layer 0 dense of width 40, layer 1 with 4 experts of width 24."""
    config = tiny_config(moe_layer_indices=[1], shared_expert_intermediate_size=16, tie_word_embeddings=True)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    expert = 3 * 32 * 24
    rest = 61 * 32 + 2 * (attention + 2 * 32) + 3 * 32 * 40 + 3 * 32 * 16 + 4 * 32 + 32
    assert size_of(config) == ModelSize(rest + 4 * expert, rest + 2 * expert, 2, 1, 4, 2)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_experts": 0}, {"use_qk_norm": True}])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_an_export_is_whole(tmp_path, changes, max_shard_size):
    model = tiny_model(**changes).bfloat16()
    export_model(model, tmp_path / "hf", max_shard_size=max_shard_size)
    description = describe_model(tmp_path / "hf")
    assert description.problems == [] and description.names_checked and not description.has_tokenizer
    assert (description.format, description.model_type) == ("moe_hf", "moe_hf")
    assert description.size.parameters == sum(p.numel() for p in model.parameters())
    assert description.size == size_of(model.config)
    assert description.tensors_by_dtype == {"bfloat16": len(description.shapes)}
    assert len(description.weight_files) == (1 if max_shard_size == "5GB" else len(list(tmp_path.glob("hf/*-of-*"))))
    assert description.weight_files.keys() == {path.name for path in (tmp_path / "hf").glob("*.safetensors")}
    assert sum(description.weight_files.values()) > 2 * description.size.parameters


@pytest.mark.parametrize("model_type", NATIVE)
def test_a_native_folder_is_whole(tmp_path, model_type):
    model = save_native(tmp_path, model_type)
    description = describe_model(tmp_path)
    assert description.problems == [] and description.names_checked
    assert (description.format, description.model_type) == ("transformers", model_type)
    fields, sparse_layers, width = NATIVE[model_type]
    experts = next((v for k, v in fields.items() if k in ("num_experts", "num_local_experts", "n_routed_experts")), 0)
    per_token = fields.get("num_experts_per_tok", 0)
    total = sum(parameter.numel() for parameter in model.parameters())
    unused = sparse_layers * (experts - per_token) * 3 * 32 * width
    assert description.size == ModelSize(total, total - unused, 2, sparse_layers, experts, per_token)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_the_names_of_the_class_are_as_good_as_those_of_the_hub(tmp_path, model_type):
    """Transformers loads folders with fused experts too."""
    model = save_native(tmp_path, model_type)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert describe_model(tmp_path).problems == []


def test_what_transformers_skips_is_not_left_over(tmp_path):
    save_native(tmp_path, "qwen3")

    def add(weights: dict) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_weights(tmp_path, add)
    assert describe_model(tmp_path).problems == []


def lose_two(weights: dict) -> None:
    del weights["model.norm.weight"], weights["model.layers.0.input_layernorm.weight"]


def cut_a_norm(weights: dict) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:31].clone()


def add_a_layer(weights: dict) -> None:
    weights |= {k.replace("layers.1", "layers.2"): v.clone() for k, v in weights.items() if "layers.1.self_attn" in k}


@pytest.mark.parametrize("model_type", ["moe_hf", "llama"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lose_two,
            "is incomplete: 2 tensors (model.layers.0.input_layernorm.weight, model.norm.weight) are missing.",
        ),
        (cut_a_norm, "does not fit its config.json: model.norm.weight (31,) instead of (32,) is of another shape."),
        (
            add_a_layer,
            "holds more than its config.json means: 4 tensors (model.layers.2.self_attn.k_proj.weight, "
            "model.layers.2.self_attn.o_proj.weight, model.layers.2.self_attn.q_proj.weight, …) are left over.",
        ),
    ],
)
def test_what_does_not_fit_the_configuration_is_named(tmp_path, model_type, change, sentence):
    make_folder(tmp_path / "hf", model_type)
    change_weights(tmp_path / "hf", change)
    assert describe_model(tmp_path / "hf").problems == [f"{tmp_path / 'hf'} {sentence}"]


def test_a_lost_shard_is_a_problem_and_the_rest_is_told(tmp_path):
    export_model(tiny_model(), tmp_path / "hf", max_shard_size="20KB")
    lost = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    lost.unlink()
    description = describe_model(tmp_path / "hf")
    assert len(description.problems) == 1 and f"has no {lost.name}" in description.problems[0]
    assert description.size == size_of(tiny_config()) and not description.names_checked
    assert lost.name not in description.weight_files and len(description.weight_files) > 1


def test_a_damaged_header_is_a_problem(tmp_path):
    export_model(tiny_model(), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    (problem,) = describe_model(tmp_path / "hf").problems
    assert problem.startswith(f"{path} is damaged")


def test_no_pickle_is_opened(tmp_path):
    """A folder whose weights are a pickle is told about, and what the pickle would do is not done."""
    tiny_config().save_pretrained(tmp_path)
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "more.pkl", "x.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    description = describe_model(tmp_path)
    assert not mark.exists()
    assert description.pickles == sorted(description.pickles) and len(description.pickles) == 6
    assert len(description.problems) == 1 and "never from pickles" in description.problems[0]
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # it is a pickle that does


def test_no_code_of_the_folder_is_executed(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    description = describe_model(tmp_path)
    assert (description.model_type, description.size, description.names_checked) == ("mine", None, False)
    assert description.shapes == {"weight": (3,)}
    with pytest.raises(CheckpointError, match=r"is a 'mine' model, which neither .* knows; code .* is not run\.$"):
        read_config(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("model_type", ["moe_hf", "llama"])
def test_a_known_architecture_is_the_one_known_here(tmp_path, model_type):
    """A folder cannot put its own classes in the place of those that its model_type names."""
    make_folder(tmp_path / "hf", model_type)
    path = tmp_path / "hf" / "config.json"
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (tmp_path / "hf" / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    description = describe_model(tmp_path / "hf")
    assert description.problems == [] and description.names_checked
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("model_type", ["moe_hf", "mixtral"])
def test_a_kernel_of_the_hub_is_not_asked_for(tmp_path, model_type):
    config = tiny_config().to_dict() if model_type == "moe_hf" else AutoConfig.for_model(model_type).to_dict()
    config |= {"attn_implementation": "kernels-community/flash-attn3", "experts_implementation": "somebody/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = read_config(tmp_path)
    assert (config._attn_implementation, config._experts_implementation) == (None, None)


def test_another_kind_of_model_is_told_without_names(tmp_path):
    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    model.save_pretrained(tmp_path)
    description = describe_model(tmp_path)
    assert (description.model_type, description.names_checked, description.problems) == ("vit", False, [])
    assert len(description.shapes) == len(model.state_dict())


def test_quantised_weights_are_not_held_against_the_names(tmp_path):
    save_native(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    change_weights(tmp_path, lambda weights: weights.update({"model.norm.weight_scale_inv": torch.ones(1)}))
    description = describe_model(tmp_path)
    assert not description.names_checked and description.problems == []
    assert description.size.layers == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not a model folder, it has no config.json; give OUTPUT_DIR/hf of a run."),
        ("{", "config.json is damaged or names no model_type; copy the folder again."),
        ("[]", "config.json is damaged or names no model_type; copy the folder again."),
        ("{}", "config.json is damaged or names no model_type; copy the folder again."),
        ('{"model_type": 3}', "config.json has model_type=3, which is no name; copy the folder again."),
    ],
)
def test_what_is_no_model_folder_is_refused(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        describe_model(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and str(error.value).endswith(sentence)


def test_an_adapter_is_no_model(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(CheckpointError, match=r"holds a PEFT adapter; merge it"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "fields", "sentence"),
    [
        ("moe_hf", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ("moe_hf", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"num_attention_heads": 5}, "config.json is not a llama configuration"),
    ],
)
def test_a_contradictory_configuration_is_a_problem(tmp_path, model_type, fields, sentence):
    make_folder(tmp_path / "hf", model_type)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    description = describe_model(tmp_path / "hf")
    assert len(description.problems) == 1 and sentence in description.problems[0]
    assert description.shapes and description.size is None


def test_only_headers_are_read(tmp_path, monkeypatch):
    export_model(tiny_model(), tmp_path / "hf")

    def refuse(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(module.SafetensorsFolder, "read", refuse)
    assert describe_model(tmp_path / "hf").problems == []
