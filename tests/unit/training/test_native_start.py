"""Training begins from a model of another architecture as from its conversion."""

from pathlib import Path

import pytest
import torch
from native_models import native_model
from safetensors.torch import load_file
from small import save_tokenizer

from moe_hf.checkpoint import source
from moe_hf.checkpoint.convert import convert
from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import train_and_export

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.fixture
def folder(tmp_path) -> Path:
    native_model("qwen3_moe", vocab_size=128).save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    save_tokenizer(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + i * i % 97}" for i in range(600)))
    return tmp_path


def train(folder: Path, model: str | Path) -> dict[str, torch.Tensor]:
    flags = {
        "model_name_or_path": model,
        "train_file": folder / "text.txt",
        "validation_split_percentage": 0,
        "cache_dir": folder / "cache",
        "output_dir": folder / "out",
        "block_size": 16,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    words = ["--do_train", "--overwrite_output_dir"]
    words += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    train_and_export(words, FailureRelay())
    return load_file(folder / "out" / "hf" / "model.safetensors")


def test_training_goes_on_from_another_architecture(folder, monkeypatch):
    expected = train(folder, folder / "ours")
    assert not list((folder / "cache").glob("converted-*"))
    monkeypatch.setattr(source, "snapshot_download", lambda name, **options: str(folder / "theirs"))
    for model in (folder / "theirs", "org/name"):
        actual = train(folder, model)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    assert len(list((folder / "cache").glob("converted-*"))) == 1
    start = load_file(folder / "ours" / "model.safetensors")
    assert not torch.equal(start["model.norm.weight"], expected["model.norm.weight"])


def test_a_pickle_is_not_a_start(folder):
    for path in (folder / "theirs").glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "theirs" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"--model_name_or_path .*theirs has its weights in pytorch_model\.bin"):
        train(folder, folder / "theirs")
