"""An export is the live model, whole, or it is not there at all."""

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import save_tokenizer, small_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, dynamic_module_utils

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint import weights
from moe_hf.checkpoint.export import expected_tensors, export_model
from moe_hf.checkpoint.weights import verify_weights
from moe_hf.errors import CheckpointError
from moe_hf.parallel.gather import FullTensorReader

TOKENS = torch.arange(3, 27).reshape(2, 12)


def make_model(seed: int = 0, **changes) -> MoEForCausalLM:
    torch.manual_seed(seed)
    model = MoEForCausalLM(small_config(**changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)  # norms begin as ones, which would hide an exchange
    return model


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_loads(folder: Path, model: MoEForCausalLM, **options) -> MoEForCausalLM:
    loaded, info = MoEForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto", **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(TOKENS).logits, model(TOKENS).logits)
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_export_is_the_state_dict(tmp_path, dtype):
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    export_model(model, tmp_path / "hf")
    tensors, state = read_files(tmp_path / "hf"), model.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name]), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["MoEForCausalLM"]
    assert MoEForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == dtype


def test_export_loads_to_the_same_logits(tmp_path):
    model = make_model()
    export_model(model, tmp_path / "hf")
    assert_loads(tmp_path / "hf", model)
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("changes", [{"num_experts": 0, "decoder_sparse_step": 1}, {"attention_gate": "headwise"}])
def test_every_kind_of_model_is_complete(tmp_path, changes):
    if changes.get("num_experts") == 0:
        changes = changes | {"shared_expert_intermediate_size": 0, "shared_expert_gate": False}
    model = make_model(attention_bias=True, **changes)
    export_model(model, tmp_path / "hf")
    assert_loads(tmp_path / "hf", model)


def test_tied_embeddings_are_written_once(tmp_path):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    export_model(model, tmp_path / "hf")
    assert read_files(tmp_path / "hf").keys() == model.state_dict().keys() - {"lm_head.weight"}
    loaded = assert_loads(tmp_path / "hf", model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("limit", [4_000, 30_000])
def test_shards_respect_their_limit_and_the_index_lists_them(tmp_path, limit):
    model = make_model()
    export_model(model, tmp_path / "hf", max_shard_size=f"{limit // 1000}KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in state.values())
    paths = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert {path.name for path in paths} == set(index["weight_map"].values()) and len(paths) > 3
    too_large = 0
    for path in paths:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        size = sum(tensor.numel() * 4 for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        too_large += size > limit
    # The largest tensor has 24,576 bytes. At the smaller limit such tensors have shards to themselves.
    assert too_large > 0 if limit == 4_000 else too_large == 0
    assert_loads(tmp_path / "hf", model)


def test_folder_carries_tokenizer_card_and_generation_config(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model = make_model()
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    export_model(model, tmp_path / "hf", tokenizer=tokenizer, model_card="# What it is\n")
    assert (tmp_path / "hf" / "README.md").read_text() == "# What it is\n"
    assert GenerationConfig.from_pretrained(tmp_path / "hf").max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("w5 w9").input_ids == [5, 9]
    assert not list(tmp_path.glob(".hf*"))


def test_live_model_and_its_configuration_stay_as_they_are(tmp_path):
    model = make_model()
    before, weights = model.config.to_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    export_model(model, tmp_path / "hf", max_shard_size="20KB")
    assert model.config.to_dict() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_export_loads_where_the_package_is_not_installed(tmp_path, monkeypatch):
    """The loader copies the model's code out of the folder, and runs that."""
    model = make_model()
    export_model(model, tmp_path / "hf")
    for name in ("configuration_moe.py", "routing.py", "modeling_moe.py"):
        assert (tmp_path / "hf" / name).is_file()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_moe.MoEConfig",
        "AutoModel": "modeling_moe.MoEModel",
        "AutoModelForCausalLM": "modeling_moe.MoEForCausalLM",
    }
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "moe_hf")
    monkeypatch.delitem(AutoModelForCausalLM._model_mapping._extra_content, MoEConfig)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert Path(sys.modules[type(loaded).__module__].__file__).is_relative_to(tmp_path / "modules")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_list_of_tensors_is_that_of_the_model_and_costs_nothing():
    expected = expected_tensors(small_config())
    assert all(tensor.is_meta for tensor in expected.values())
    state = MoEForCausalLM(small_config()).state_dict()
    assert {name: tensor.shape for name, tensor in expected.items()} == {name: t.shape for name, t in state.items()}
    assert "lm_head.weight" not in expected_tensors(small_config(tie_word_embeddings=True))


# --------------------------------------------------------------------------------------------------------------------
# Memory


def test_one_shard_and_one_tensor_are_held_at_a_time(tmp_path, monkeypatch):
    alive: dict[str, weakref.ref] = {}
    held_at_read, read_in_order, files = [], [], []
    read, save = FullTensorReader.read, weights.save_file

    def watch_read(self, name: str) -> torch.Tensor:
        held_at_read.append({other for other, reference in alive.items() if reference() is not None})
        tensor = read(self, name)
        alive[name] = weakref.ref(tensor)
        read_in_order.append(name)
        return tensor

    def watch_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict) -> None:
        files.append(set(tensors))
        save(tensors, path, metadata)

    monkeypatch.setattr(FullTensorReader, "read", watch_read)
    monkeypatch.setattr(weights, "save_file", watch_save)
    names_told = []
    export_model(make_model(), tmp_path / "hf", max_shard_size="20KB", on_tensor=names_told.append)
    assert len(files) > 3 and set.union(*files) == set(read_in_order)
    assert names_told == read_in_order and len(set(read_in_order)) == len(read_in_order)
    for name, held in zip(read_in_order, held_at_read, strict=True):
        (shard,) = (file for file in files if name in file)
        # Of other shards at most the tensor read last, which the loop's variable still holds.
        assert len(held - shard) <= 1, (name, held - shard)
    assert any(len(held & file) == len(file) - 1 > 1 for held in held_at_read for file in files)
    assert all(reference() is None for reference in alive.values())


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder `hf` with an earlier export, of a model with other weights."""
    export_model(make_model(seed=1), tmp_path / "hf", model_card="the old one")
    (tmp_path / "hf" / "of_the_old_one.txt").write_text("old")
    return tmp_path / "hf"


def test_earlier_export_is_replaced_whole(old):
    model = make_model(seed=2)
    (old.parent / ".hf.incomplete").mkdir()
    (old.parent / ".hf.incomplete" / "left_by_a_killed_run.safetensors").write_text("torn")
    (old.parent / ".hf.replaced").mkdir()
    export_model(model, old, max_shard_size="20KB")
    assert not (old / "of_the_old_one.txt").exists() and not (old / "README.md").exists()
    assert not (old / "model.safetensors").exists() and not (old / "left_by_a_killed_run.safetensors").exists()
    assert_loads(old, model)
    assert [path.name for path in old.parent.iterdir()] == ["hf"]


def without_a_tensor(model: MoEForCausalLM, monkeypatch) -> None:
    del model.model.layers[1].mlp.gate.weight


def with_a_wrong_shape(model: MoEForCausalLM, monkeypatch) -> None:
    """As when half of the experts were forgotten, which is what a plain save of an expert-parallel model does."""
    read = FullTensorReader.read

    def read_half(self, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor[: len(tensor) // 2] if name.endswith("layers.3.mlp.experts.down_proj") else tensor

    monkeypatch.setattr(FullTensorReader, "read", read_half)


def with_a_full_disk(model: MoEForCausalLM, monkeypatch) -> None:
    save, files = weights.save_file, []

    def fail_at_the_second_file(tensors, path, metadata) -> None:
        files.append(path)
        if len(files) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", fail_at_the_second_file)


def with_a_torn_file(model: MoEForCausalLM, monkeypatch) -> None:
    save = weights.save_file

    def lose_a_tensor(tensors, path, metadata) -> None:
        save({name: t for name, t in tensors.items() if name != "model.norm.weight"}, path, metadata)

    monkeypatch.setattr(weights, "save_file", lose_a_tensor)


def with_an_error_of_a_library(model: MoEForCausalLM, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("cannot be serialised")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", fail)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_a_tensor, "has no tensor for model.layers.1.mlp.gate.weight, so the export would be incomplete."),
        (
            with_a_wrong_shape,
            "model.layers.3.mlp.experts.down_proj has shape (2, 32, 24) but the model's is (4, 32, 24).",
        ),
        (with_a_full_disk, "Could not write the export: OSError: [Errno 28] No space left on device."),
        (with_a_torn_file, "model.norm.weight is in its index but in no file."),
        (with_an_error_of_a_library, "Could not write the export: RuntimeError: cannot be serialised."),
    ],
)
def test_old_export_survives_a_failure(old, monkeypatch, spoil, sentence):
    before = contents(old)
    model = make_model(seed=2)
    spoil(model, monkeypatch)
    with pytest.raises(CheckpointError) as error:
        export_model(model, old, max_shard_size="20KB")
    assert sentence in str(error.value)
    assert contents(old) == before
    monkeypatch.undo()
    assert_loads(old, make_model(seed=1))
    # What the failure has left beside it is in nobody's way.
    export_model(make_model(seed=3), old)
    assert_loads(old, make_model(seed=3))
    assert [path.name for path in old.parent.iterdir()] == ["hf"]


def test_ranks_go_on_gathering_after_a_failed_write(tmp_path, monkeypatch):
    """The others wait in a collective call for each tensor: whoever cannot write must still take part in all."""
    model, names = make_model(), []
    with_a_full_disk(model, monkeypatch)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_model(model, tmp_path / "hf", max_shard_size="20KB", on_tensor=names.append)
    assert set(names) == model.state_dict().keys()
    assert not (tmp_path / "hf").exists()


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    names = []
    export_model(make_model(), tmp_path / "hf", on_tensor=names.append)
    assert set(names) == make_model().state_dict().keys()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda expected: expected.pop("lm_head.weight"), "missing nothing, surplus ['lm_head.weight']"),
        (lambda expected: expected.update(new=torch.ones(1)), "missing ['new'], surplus none"),
        (
            lambda expected: expected.update({"model.norm.weight": torch.ones(31)}),
            "model.norm.weight was written as torch.float32 (32,), not torch.float32 (31,)",
        ),
    ],
)
def test_files_are_compared_with_what_is_expected(tmp_path, change, sentence):
    model = make_model()
    export_model(model, tmp_path / "hf")
    expected = expected_tensors(model.config)
    verify_weights(tmp_path / "hf", expected)
    change(expected)
    with pytest.raises(CheckpointError) as error:
        verify_weights(tmp_path / "hf", expected)
    assert sentence in str(error.value)
