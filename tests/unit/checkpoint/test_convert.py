"""Conversion is exact both ways, holds little in memory, and leaves a whole folder or none."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from native_models import NATIVES, assert_same_files, load, logits, native_model, randomize, read_files
from safetensors import SafetensorError
from small import save_tokenizer, small_config
from transformers import AutoTokenizer, GenerationConfig

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint import architectures, weights
from moe_hf.checkpoint.convert import convert, write_native_folder, write_native_weights
from moe_hf.checkpoint.source import SafetensorsFolder, open_model
from moe_hf.errors import CheckpointError, ConfigError


def save_native(folder: Path, name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **options) -> Path:
    model = native_model(name).to(dtype)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(folder, **options)
    return folder


def save_ours(folder: Path, **changes) -> MoEForCausalLM:
    torch.manual_seed(0)
    model = MoEForCausalLM(small_config(**changes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


# --------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NATIVES)
def test_other_architectures_come_back_bit_by_bit(tmp_path, name, dtype):
    """Every step cuts the files anew."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    save_native(theirs, name, dtype, max_shard_size="9KB")
    convert(theirs, ours, max_shard_size="20KB")
    convert(ours, back, to=NATIVES[name][0], max_shard_size="5KB")
    assert_same_files(back, theirs)
    assert len(list(ours.glob("*.safetensors"))) > 1 and len(list(back.glob("*.safetensors"))) > 3
    expected = logits(load(theirs, NATIVES[name][0], dtype=dtype))
    assert torch.equal(logits(load(back, NATIVES[name][0], dtype="auto")), expected)
    loaded = load(ours, "moe_hf", dtype="auto")
    assert loaded.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


OURS = {
    "mixtral": {"use_qk_norm": False, "shared_expert_intermediate_size": 0, "shared_expert_gate": False},
    "qwen2_moe": {"use_qk_norm": False, "decoder_sparse_step": 2},
    "qwen3_moe": {"shared_expert_intermediate_size": 0, "shared_expert_gate": False, "moe_layer_indices": [0, 3]},
    "olmoe": {"shared_expert_intermediate_size": 0, "shared_expert_gate": False, "qk_norm_scope": "full"},
    "glm4_moe": {
        "shared_expert_intermediate_size": 48,
        "shared_expert_gate": False,
        "scoring_func": "sigmoid",
        "router_balancing": "loss_free",
        "first_k_dense_replace": 2,
        "rope_parameters": {"rope_theta": 77.0, "partial_rotary_factor": 0.5},
    },
    "dots1": {
        "num_experts": 8,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gate": False,
        "scoring_func": "sigmoid",
        "router_balancing": "loss_free",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "llama": {
        "num_experts": 0,
        "use_qk_norm": False,
        "shared_expert_intermediate_size": 0,
        "shared_expert_gate": False,
    },
    "qwen3": {
        "num_experts": 0,
        "tie_word_embeddings": True,
        "shared_expert_intermediate_size": 0,
        "shared_expert_gate": False,
    },
}


def changes_for(model_type: str) -> dict:
    return {"decoder_sparse_step": 1} | OURS[model_type]


@pytest.mark.parametrize("model_type", OURS)
def test_ours_come_back_bit_by_bit(tmp_path, model_type):
    model = save_ours(tmp_path / "ours", **changes_for(model_type))
    convert(tmp_path / "ours", tmp_path / "theirs", to=model_type, max_shard_size="7KB")
    convert(tmp_path / "theirs", tmp_path / "back", max_shard_size="30KB")
    assert_same_files(tmp_path / "back", tmp_path / "ours")
    theirs = load(tmp_path / "theirs", model_type)
    assert type(theirs).__module__.startswith("transformers.models.")
    expected = logits(model)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(logits(load(tmp_path / "back", "moe_hf")), expected)


def test_model_without_correction_bias_gets_one_of_zeros(tmp_path):
    changes = changes_for("dots1") | {"router_balancing": "aux_loss"}
    model = save_ours(tmp_path / "ours", **changes)
    convert(tmp_path / "ours", tmp_path / "theirs", to="dots1")
    bias = read_files(tmp_path / "theirs")["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, torch.zeros(8))
    expected = logits(model)
    actual = logits(load(tmp_path / "theirs", "dots1"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["moe_hf", "glm4_moe"])
def test_dtype_is_changed_on_request(tmp_path, dtype, to):
    save_ours(tmp_path / "ours", **changes_for("glm4_moe"))
    convert(tmp_path / "ours", tmp_path / "other", to=to, dtype=dtype)
    for name, tensor in read_files(tmp_path / "other").items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else dtype), name
    assert json.loads((tmp_path / "other" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert load(tmp_path / "other", to).dtype == dtype


def test_values_too_large_for_the_dtype_are_named(tmp_path):
    model = save_ours(tmp_path / "ours")
    model.model.norm.weight.data[3] = -70_000.0
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "wide", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 70000, too much for torch.float16"):
        convert(tmp_path / "ours", tmp_path / "narrow", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "wide"]


@pytest.mark.parametrize("to", ["moe_hf", "qwen3_moe"])
def test_tokenizer_and_generation_settings_come_along(tmp_path, to):
    save_native(tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs")
    GenerationConfig(max_new_tokens=7, eos_token_id=[4, 9]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "other", to=to)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "other")("w5 w9").input_ids == [5, 9]
    assert load(tmp_path / "other", to).generation_config.eos_token_id == [4, 9]
    has_code = (tmp_path / "other" / "modeling_moe.py").exists()
    assert has_code == ("auto_map" in json.loads((tmp_path / "other" / "config.json").read_text())) == (to == "moe_hf")


def test_generation_settings_are_made_where_there_are_none(tmp_path):
    save_native(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    for to in ("moe_hf", "qwen3_moe"):
        convert(tmp_path / "theirs", tmp_path / to, to=to)
        assert GenerationConfig.from_pretrained(tmp_path / to).eos_token_id == [4, 5]


def test_a_live_model_and_its_tokenizer_are_written(tmp_path):
    """What `moe-hf export --to` does, from tensors in memory."""
    model = save_ours(tmp_path / "ours", **changes_for("qwen3_moe"))
    save_tokenizer(tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    names = []
    model.config.use_cache = False
    architecture = architectures.get("qwen3_moe")
    write_native_folder(
        tmp_path / "theirs",
        architecture,
        model.config,
        torch.float32,
        model.state_dict().__getitem__,
        tokenizer=tokenizer,
        generation_config=GenerationConfig(max_new_tokens=5),
        on_tensor=names.append,
    )
    assert names == list(architecture.native_tensors(model.config, torch.float32))
    theirs = load(tmp_path / "theirs", "qwen3_moe")
    assert theirs.config.use_cache and theirs.generation_config.max_new_tokens == 5
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs")("w5").input_ids == [5]
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-4)


def test_a_process_that_does_not_write_reads_all_the_same(tmp_path):
    """Reading is a collective call there: every process must ask for the same tensors in the same order."""
    model = save_ours(tmp_path / "ours", **changes_for("dots1") | {"router_balancing": "none"})
    architecture, state = architectures.get("dots1"), model.state_dict()
    asked = {}
    for rank, folder in ((0, tmp_path / "first"), (1, tmp_path / "second")):
        folder.mkdir()
        asked[rank] = []

        def read(name: str, rank: int = rank) -> torch.Tensor | None:
            asked[rank].append(name)
            return state[name] if rank == 0 else None

        write_native_weights(folder, architecture, model.config, torch.float32, read, collective=True)
    assert asked[0] == asked[1] and len(asked[0]) == len(architecture.tensors(model.config).by_moe)
    assert list((tmp_path / "first").iterdir()) and not list((tmp_path / "second").iterdir())


# --------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("to", ["moe_hf", "qwen3_moe"])
def test_one_shard_and_one_tensor_are_held_at_a_time(tmp_path, monkeypatch, to):
    if to == "moe_hf":
        save_native(tmp_path / "source")
    else:
        save_ours(tmp_path / "source", **changes_for(to))
    alive: dict[str, weakref.ref] = {}
    most_held, reads, files = 0, [], []
    read, save = SafetensorsFolder.read, weights.save_file

    def watch_read(self, name: str) -> torch.Tensor:
        nonlocal most_held
        tensor = read(self, name)
        alive[name] = weakref.ref(tensor)
        reads.append(name)
        most_held = max(most_held, sum(r().nbytes for r in alive.values() if r() is not None))
        return tensor

    def watch_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict) -> None:
        files.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
        save(tensors, path, metadata)

    monkeypatch.setattr(SafetensorsFolder, "read", watch_read)
    monkeypatch.setattr(weights, "save_file", watch_save)
    limit = 40_000
    convert(tmp_path / "source", tmp_path / "output", to=to, max_shard_size="40KB")
    sizes = {name: tensor.nbytes for name, tensor in read_files(tmp_path / "source").items()}
    assert sorted(reads) == sorted(sizes), "every tensor of the source is read once"
    assert len(files) > 3 and max(files) <= limit
    assert most_held <= limit + 2 * max(sizes.values()) < sum(sizes.values()) / 2
    assert all(reference() is None for reference in alive.values())


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_model_without_counterpart_is_refused_before_anything_is_written(tmp_path):
    save_ours(tmp_path / "ours")
    with pytest.raises(ConfigError, match="has no counterpart in mixtral, where it must be"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="mixtral")
    with pytest.raises(ConfigError, match="'gpt2' cannot be converted"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_folder_that_is_there_is_kept(tmp_path):
    save_native(tmp_path / "theirs")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("x")
    with pytest.raises(ConfigError, match=r"--output .*output is already there; give a new folder"):
        convert(tmp_path / "theirs", tmp_path / "output")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["precious"]


def test_a_wrong_shard_size_is_named(tmp_path):
    save_native(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="--max-shard-size five is not a size such as 500MB or 5GB"):
        convert(tmp_path / "theirs", tmp_path / "output", max_shard_size="five")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, error):
    save_native(tmp_path / "theirs")
    save, files = weights.save_file, []

    def fail_at_the_second_file(tensors, path, metadata) -> None:
        files.append(path)
        if len(files) == 2:
            raise error
        save(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", fail_at_the_second_file)
    with pytest.raises(CheckpointError, match=r"output could not be written: .*No space left"):
        convert(tmp_path / "theirs", tmp_path / "output", max_shard_size="20KB")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_source_that_is_torn_while_it_is_read_leaves_nothing_behind(tmp_path, monkeypatch):
    save_native(tmp_path / "theirs")
    read = SafetensorsFolder.read

    def lose_half(self, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor[:5] if name == "model.norm.weight" else tensor

    monkeypatch.setattr(SafetensorsFolder, "read", lose_half)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(5,\) but the model's is \(32,\)"):
        convert(tmp_path / "theirs", tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_converted_folder_opens_again(tmp_path):
    save_native(tmp_path / "theirs", "mixtral", torch.bfloat16)
    convert(tmp_path / "theirs", tmp_path / "ours")
    opened = open_model(tmp_path / "ours")
    assert (opened.model_type, opened.dtype, opened.config.num_experts) == ("moe_hf", torch.bfloat16, 5)
