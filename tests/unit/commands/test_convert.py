"""`moe-hf convert` on the command line."""

import argparse
import subprocess
import sys

import pytest
import torch
from native_models import load, logits, native_model

from moe_hf.checkpoint import architectures
from moe_hf.commands import convert
from moe_hf.errors import ConfigError


def run(*words: object) -> None:
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["convert", *map(str, words)])
    arguments.run(arguments)


def test_model_becomes_ours_and_theirs_again(tmp_path, capsys):
    model = native_model("olmoe")
    model.save_pretrained(tmp_path / "theirs")
    run("--model", tmp_path / "theirs", "--output", tmp_path / "ours", "--max-shard-size", "20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    told = capsys.readouterr()
    assert "tensor" in told.err, "no progress bar"
    assert told.out.endswith(f"{tmp_path / 'theirs'} → {tmp_path / 'ours'} (moe_hf)\n")
    expected = logits(model)
    torch.testing.assert_close(logits(load(tmp_path / "ours", "moe_hf")), expected, rtol=0, atol=1e-4)
    run("--model", tmp_path / "ours", "--output", tmp_path / "back", "--to", "olmoe", "--dtype", "bfloat16")
    assert load(tmp_path / "back", "olmoe").dtype == torch.bfloat16


def test_refusal_is_a_user_error(tmp_path):
    native_model("qwen3_moe").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="use_qk_norm=True has no counterpart in mixtral"):
        run("--model", tmp_path / "theirs", "--output", tmp_path / "other", "--to", "mixtral")
    with pytest.raises(SystemExit):
        run("--model", tmp_path / "theirs", "--output", tmp_path / "other", "--dtype", "int8")
    with pytest.raises(SystemExit):
        run("--model", tmp_path / "theirs", "--output", tmp_path / "other", "--to", "gpt2")
    with pytest.raises(SystemExit):
        run("--model", tmp_path / "theirs")
    assert not (tmp_path / "other").exists()


def test_every_architecture_is_offered():
    assert ("moe_hf", *architectures.names()) == convert.ARCHITECTURES


def test_help_needs_no_torch():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('moe_hf'); package.__path__ = ['moe_hf']; sys.modules['moe_hf'] = package\n"
        "import moe_hf.commands.convert\n"
        "assert not {'torch', 'transformers', 'tqdm'} & sys.modules.keys(), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
