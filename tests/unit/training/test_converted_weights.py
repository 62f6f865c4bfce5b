"""Weights of another architecture are converted once, and never taken for those of another model."""

import os
from pathlib import Path

import pytest
import torch
from native_models import load, logits, native_model
from safetensors.torch import load_file, save_file
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.errors import CheckpointError
from moe_hf.training import converted_weights
from moe_hf.training.converted_weights import loadable_folder


@pytest.fixture
def mixtral(tmp_path) -> Path:
    native_model("mixtral").save_pretrained(tmp_path / "mixtral", max_shard_size="20KB")
    return tmp_path / "mixtral"


@pytest.fixture
def conversions(monkeypatch) -> list:
    """The folders that were really converted."""
    done, convert = [], converted_weights.convert

    def watch(folder: Path, *args, **options) -> None:
        done.append(folder)
        convert(folder, *args, **options)

    monkeypatch.setattr(converted_weights, "convert", watch)
    return done


def test_our_own_folder_is_loaded_itself(tmp_path, conversions):
    MoEForCausalLM(small_config()).save_pretrained(tmp_path / "ours")
    assert loadable_folder(tmp_path / "ours", str(tmp_path / "cache")) == tmp_path / "ours"
    assert not conversions and not (tmp_path / "cache").exists()


def test_other_architectures_are_converted_once(tmp_path, mixtral, conversions):
    cache = tmp_path / "cache"
    folder = loadable_folder(str(mixtral), str(cache))
    assert folder.parent == cache and [path.name for path in cache.iterdir()] == [folder.name]
    expected = logits(load(mixtral, "mixtral"))
    torch.testing.assert_close(logits(load(folder, "moe_hf")), expected, rtol=0, atol=1e-4)
    assert loadable_folder(mixtral, str(cache)) == folder and conversions == [mixtral]


def test_default_cache_is_that_of_the_corpus(tmp_path, mixtral, monkeypatch):
    monkeypatch.setattr(converted_weights, "default_cache_dir", lambda: str(tmp_path / "usual"))
    assert loadable_folder(mixtral).parent == tmp_path / "usual"


def test_other_weights_or_another_configuration_are_another_model(tmp_path, mixtral, conversions):
    cache = str(tmp_path / "cache")
    folders = {loadable_folder(mixtral, cache)}
    path = sorted(mixtral.glob("*.safetensors"))[3]
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, {"format": "pt"})
    os.utime(path, ns=times)  # same name, size and time: only its content tells
    folders.add(loadable_folder(mixtral, cache))
    os.utime(path, ns=(times[0], times[1] + 1))
    folders.add(loadable_folder(mixtral, cache))
    (mixtral / "config.json").write_text((mixtral / "config.json").read_text() + " ")
    folders.add(loadable_folder(mixtral, cache))
    assert len(folders) == len(conversions) == 4


def test_the_faster_process_wins(tmp_path, mixtral, monkeypatch):
    convert, cache = converted_weights.convert, tmp_path / "cache"

    def be_overtaken(folder, output, **options) -> None:
        convert(folder, output, **options)
        convert(folder, cache / output.parent.name[1 : -len("-12345678")], **options)

    monkeypatch.setattr(converted_weights, "convert", be_overtaken)
    folder = loadable_folder(mixtral, str(cache))
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert load(folder, "moe_hf")


def test_failure_leaves_nothing_that_could_be_loaded(tmp_path, mixtral, monkeypatch):
    cache = tmp_path / "cache"
    sorted(mixtral.glob("*.safetensors"))[2].unlink()
    with pytest.raises(CheckpointError, match="has no model-00003"):
        loadable_folder(mixtral, str(cache))
    assert not list(cache.iterdir())
