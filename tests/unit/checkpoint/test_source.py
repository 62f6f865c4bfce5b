"""Opening a model finds everything that is wrong with it from names and shapes alone, and runs no code of it."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from native_models import NATIVES, load, logits, native_config, native_model, read_files
from safetensors.torch import save_file
from small import save_tokenizer, small_config

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint import source
from moe_hf.checkpoint.export import expected_tensors
from moe_hf.checkpoint.source import copy_side_files, local_folder, open_model, read_config
from moe_hf.errors import CheckpointError, ConfigError


def save_native(folder: Path, name: str = "qwen3_moe", **options) -> Path:
    native_model(name).save_pretrained(folder, **options)
    return folder


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a folder of one file, add new ones, and take away those that are None."""
    tensors = read_files(folder) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def as_moe(opened: source.MoESource) -> MoEForCausalLM:
    model = MoEForCausalLM(opened.config).eval()
    state = {name: opened.read(name) for name in expected_tensors(opened.config)}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.tie_weights()
    return model


# --------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("limit", ["5GB", "3KB"])
@pytest.mark.parametrize("name", NATIVES)
def test_other_architectures_have_the_same_logits(tmp_path, name, limit):
    expected = logits(load(save_native(tmp_path, name, max_shard_size=limit)))
    assert len(list(tmp_path.glob("*.safetensors"))) > (5 if limit == "3KB" else 0)
    opened = open_model(str(tmp_path))
    assert (opened.model_type, opened.dtype, opened.folder) == (NATIVES[name][0], torch.float32, tmp_path)
    torch.testing.assert_close(logits(as_moe(opened)), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe", "glm4_moe"])
def test_fused_experts_are_read_too(tmp_path, name):
    """As Transformers writes them when it is told not to use the names of the hub."""
    save_native(tmp_path, name, save_original_format=False)
    names = read_files(tmp_path).keys()
    assert "model.layers.2.mlp.experts.gate_up_proj" in names and not any(".experts.0." in n for n in names)
    expected = logits(native_model(name))
    torch.testing.assert_close(logits(as_moe(open_model(tmp_path))), expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"router_balancing": "loss_free"}])
def test_our_own_folders_are_read_as_they_are(tmp_path, changes):
    torch.manual_seed(0)
    model = MoEForCausalLM(small_config(**changes))
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert opened.model_type == "moe_hf" and opened.dtype == torch.float32
    state = model.state_dict()
    for name in expected_tensors(opened.config):
        assert torch.equal(opened.read(name), state[name])
    written = ("architectures", "dtype", "auto_map")
    assert [
        {name: value for name, value in config.to_dict().items() if name not in written}
        for config in (opened.config, model.config)
    ] == [{name: value for name, value in small_config(**changes).to_dict().items() if name not in written}] * 2


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    save_native(tmp_path)
    names = []
    read = source.SafetensorsFolder.read
    monkeypatch.setattr(source.SafetensorsFolder, "read", lambda self, name: names.append(name) or read(self, name))
    opened = open_model(tmp_path)
    assert names == []
    opened.read("model.norm.weight")
    assert names == ["model.norm.weight"]
    opened.read("model.layers.1.mlp.experts.down_proj")
    assert names[1:] == [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(6)]


def test_dtype_is_the_narrowest_that_loses_nothing(tmp_path):
    save_native(tmp_path, "glm4_moe")
    tensors = {n: t.bfloat16() for n, t in read_files(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_model(tmp_path).dtype == torch.bfloat16
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    change_weights(tmp_path, **{"model.layers.1.mlp.gate.e_score_correction_bias": bias.float()})
    assert open_model(tmp_path).dtype == torch.bfloat16
    half = torch.full((24, 32), 60_000.0, dtype=torch.float16)
    change_weights(tmp_path, **{"model.layers.2.mlp.experts.7.up_proj.weight": half})
    opened = open_model(tmp_path)
    assert opened.dtype == torch.float32
    fused = opened.read("model.layers.2.mlp.experts.gate_up_proj")
    assert fused.dtype == torch.float32 and torch.equal(fused[7, 24:], half.float())
    assert torch.equal(fused[6, 24:], tensors["model.layers.2.mlp.experts.6.up_proj.weight"].float())


def test_layers_that_predict_further_ahead_are_left_out(tmp_path):
    save_native(tmp_path, "glm4_moe")
    extra = {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}
    change_weights(tmp_path, **extra)
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.3\.eh_proj\.weight, which its glm4_moe"):
        open_model(tmp_path)
    change_config(tmp_path, num_nextn_predict_layers=1)
    assert open_model(tmp_path).config.num_hidden_layers == 3
    change_weights(tmp_path, **{"model.layers.4.eh_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.4\.eh_proj\.weight"):
        open_model(tmp_path)


def test_tables_of_positions_and_a_second_copy_of_tied_weights_are_let_through(tmp_path):
    save_native(tmp_path, "llama_tied")
    embedding = read_files(tmp_path)["model.embed_tokens.weight"]
    change_weights(
        tmp_path,
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding.clone()},
    )
    assert open_model(tmp_path).config.tie_word_embeddings
    change_weights(tmp_path, **{"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings=True, but its lm_head.weight is not"):
        open_model(tmp_path)


def test_side_files_are_copied_byte_by_byte(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    save_tokenizer(first)
    (first / "generation_config.json").write_text('{"temperature":  0.5}')
    (first / "modeling_evil.py").write_text("raise SystemExit")
    (first / "pytorch_model.bin").write_text("pickle")
    copy_side_files(first, second)
    assert {path.name for path in second.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert all((first / path.name).read_bytes() == path.read_bytes() for path in second.iterdir())


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("lm_head.weight", None, "lacks lm_head.weight, which its qwen3_moe configuration asks for."),
        (
            "model.layers.1.mlp.experts.4.up_proj.weight",
            None,
            "lacks model.layers.1.mlp.experts.4.up_proj.weight, which its qwen3_moe configuration asks for.",
        ),
        (
            "model.layers.1.mlp.experts.4.up_proj.weight",
            torch.ones(1, 32),  # would spread over all rows
            "has model.layers.1.mlp.experts.4.up_proj.weight of shape (1, 32), but its configuration says (24, 32).",
        ),
        (
            "model.norm.weight",
            torch.ones(31),
            "has model.norm.weight of shape (31,), but its configuration",
        ),
        (
            "model.layers.1.mlp.experts.6.up_proj.weight",
            torch.ones(24, 32),
            "holds model.layers.1.mlp.experts.6.up_proj.weight, which its qwen3_moe configuration has not.",
        ),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(48), "holds model.layers.0.self_attn.q_proj.bias, which"),
        (
            "model.norm.weight",
            torch.ones(32, dtype=torch.int8),
            "has model.norm.weight as torch.int8; quantized weights cannot be converted.",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_named(tmp_path, name, change, sentence):
    save_native(tmp_path)
    open_model(tmp_path)
    change_weights(tmp_path, **{name: change})
    with pytest.raises(CheckpointError) as error:
        open_model(tmp_path)
    assert sentence in str(error.value)


def test_our_own_torn_folder_is_named(tmp_path):
    MoEForCausalLM(small_config()).save_pretrained(tmp_path)
    change_weights(tmp_path, **{"model.layers.1.mlp.gate.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.gate\.weight, which its moe_hf conf"):
        open_model(tmp_path)


def test_a_file_cut_short_and_a_missing_shard_are_named(tmp_path):
    save_native(tmp_path, max_shard_size="20KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged"):
        open_model(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"has no {path.name}"):
        open_model(tmp_path)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_by_name_and_not_opened(tmp_path, name):
    folder = tmp_path / "model"
    native_config("llama").save_pretrained(folder)
    torch.save(Evil(tmp_path / "executed"), folder / name)
    with pytest.raises(CheckpointError, match=rf"has its weights in {name}, a pickle, which can run code when it is"):
        open_model(folder)
    assert not (tmp_path / "executed").exists()


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    save_native(tmp_path / "model")
    torch.save(Evil(tmp_path / "executed"), tmp_path / "model" / "pytorch_model.bin")
    opened = open_model(tmp_path / "model")
    opened.read("model.norm.weight")
    assert not (tmp_path / "executed").exists()


def test_code_in_the_folder_is_not_run(tmp_path):
    save_native(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    change_config(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    open_model(tmp_path)
    change_config(tmp_path, model_type="evil")
    with pytest.raises(ConfigError, match="'evil' cannot be converted; known are moe_hf, mixtral"):
        open_model(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[1]", "cannot be read: "),
        ("{}", "cannot be read: it names no model_type."),
        ('{"model_type": 3}', "cannot be read: it names no model_type."),
        ('{"model_type": "llama", "hidden_size": "x"}', "is not a valid llama one: "),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "is not a valid llama one: "),
        ('{"model_type": "moe_hf", "num_expert": 3}', "num_expert=3 is not a field of MoEConfig"),
        ('{"model_type": "deepseek_v3"}', "deepseek_v3 has multi-head latent attention, which moe_hf has not"),
    ],
)
def test_configurations_that_cannot_be_read_are_named(tmp_path, content, sentence):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        read_config(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["absent", "/absent/model", "./absent/model", "a/b/c"])
def test_paths_are_not_looked_up_on_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", None)
    with pytest.raises(CheckpointError, match=r"is not a folder with a config\.json and weights"):
        local_folder(path)


def test_models_of_the_hub_come_without_pickles_and_code(tmp_path, monkeypatch):
    save_native(tmp_path)
    asked = {}

    def download(name: str, **options) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", download)
    assert open_model("org/a-model.v2").folder == tmp_path
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer.model", "generation_config.json", "merges.txt"]
    others = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "original/model.safetensors", "x.gguf"]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects(files + others, **patterns)) == files and asked["name"] == "org/a-model.v2"


def test_error_of_the_hub_is_one_sentence(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise LocalEntryNotFoundError("Cannot find the snapshot.\n\nCheck your connection.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as error:
        open_model("org/model")
    assert str(error.value) == "org/model is neither a folder nor a model that the hub gives: Cannot find the snapshot."


def test_a_repository_without_configuration_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"org/model has no config\.json on the hub"):
        open_model("org/model")
