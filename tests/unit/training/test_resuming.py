"""Which checkpoint a run goes on from: the one it names, or the newest whole one, of which every byte is looked at."""

import random
import shutil
import time
from argparse import Namespace
from itertools import count
from pathlib import Path

import pytest
from small import small_config

from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import ConfigError, UserError
from moe_hf.training.resuming import ResumeChoice

LAYOUT = Topology(world_size=1, expert_parallel_size=0, zero_stage=2, dtype="float32")
OTHER = Topology(world_size=8, expert_parallel_size=4, zero_stage=3, dtype="bfloat16")


def make(folder: Path, step: int, layout: Topology = LAYOUT, **others) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name in (f"global_step{step}/shard.pt", "latest", "hf/model.safetensors", "hf/config.json"):
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(step).randbytes(200))
    write_manifest(checkpoint, layout, small_config(), Progress(step), **others)
    return checkpoint


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    seconds = count(1000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    for step in (3, 6, 9):
        make(tmp_path, step)
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 16
    path.write_bytes(content)


def chosen(run: Path, resume: Path | str | None, reset: bool = False, layout: Topology = LAYOUT, **config):
    """Return the checkpoint chosen, or the sentence that refuses it."""
    namespace = Namespace(
        output_dir=str(run), resume_from_checkpoint=resume if resume is None else str(resume), reset_optimizer=reset
    )
    try:
        checkpoint = ResumeChoice(namespace, layout, small_config(**config)).verified()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return checkpoint and checkpoint.name


def test_without_the_flag_nothing_is_resumed(run, capsys):
    assert chosen(run, None) is None
    assert capsys.readouterr().out == ""


def test_named_checkpoint_is_resumed(run, capsys):
    assert chosen(run, run / "checkpoint-6") == "checkpoint-6"
    assert chosen(run / "elsewhere", run / "checkpoint-3") == "checkpoint-3"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("word", ["true", "True", "auto", "AUTO"])
def test_newest_is_resumed(run, word, capsys):
    assert chosen(run, word) == "checkpoint-9"
    assert capsys.readouterr().out == f"Resuming from {run}/checkpoint-9.\n"


def test_named_checkpoint_that_is_torn_is_refused_and_another_offered(run):
    torn = run / "checkpoint-6"
    flip(torn / "latest")
    assert chosen(run, torn) == (
        f"CheckpointError: {torn} is torn: latest is not what was saved, its SHA-256 differs; "
        f"resume from {run / 'checkpoint-9'}."
    )
    (torn / "latest").unlink()
    assert chosen(run, torn).endswith(f"latest is missing; resume from {run / 'checkpoint-9'}.")
    assert chosen(run, run / "checkpoint-4").startswith("CheckpointError: There is no checkpoint at")


@pytest.mark.parametrize("word", ["true", "auto"])
def test_torn_ones_are_passed_over_and_named(run, word, capsys):
    flip(run / "checkpoint-9" / "global_step9" / "shard.pt")
    assert chosen(run, word) == "checkpoint-6"
    assert capsys.readouterr().out == (
        f"{run}/checkpoint-9 is torn: global_step9/shard.pt is not what was saved, its SHA-256 differs.\n"
        f"Resuming from {run}/checkpoint-6.\n"
    )
    (run / "checkpoint-9" / "latest").unlink()
    assert chosen(run, word) == "checkpoint-6"
    assert capsys.readouterr().out == (
        f"{run}/checkpoint-9 is torn: latest is missing.\nResuming from {run}/checkpoint-6.\n"
    )


def test_where_all_are_torn_auto_starts_anew_and_true_refuses(run, capsys):
    for step in (3, 6, 9):
        flip(run / f"checkpoint-{step}" / "latest")
    torn = f"{run}/checkpoint-9 is torn: latest is not what was saved, its SHA-256 differs"
    assert chosen(run, "auto") is None
    assert capsys.readouterr().out == f"{torn}. Starting anew.\n"
    assert chosen(run, "true") == f"CheckpointError: {torn}; there is no other whole checkpoint beside it."
    for step in (3, 6, 9):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    assert chosen(run, "auto") is None
    without = f"{run}/checkpoint-9 has no manifest.json, so it is not a whole checkpoint of run_clm_moe.py."
    assert capsys.readouterr().out == f"{without} Starting anew.\n"
    assert chosen(run, "true") == f"CheckpointError: {without[:-1]}; there is no other whole checkpoint beside it."


def test_where_there_is_none_auto_starts_anew_and_true_refuses(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        assert chosen(folder, "auto") is None
        assert "there is no checkpoint-N in" in chosen(folder, "true")
    (tmp_path / ".checkpoint-3.incomplete").mkdir()
    capsys.readouterr()
    assert chosen(tmp_path, "auto") is None
    assert capsys.readouterr().out == f"There is no whole checkpoint in {tmp_path}. Starting anew.\n"


def test_checkpoint_that_was_moved_aside_is_found(run):
    """A run was killed while it put a new checkpoint in the place of the old one."""
    (run / "checkpoint-9").rename(run / ".checkpoint-9.replaced")
    assert chosen(run, "auto") == "checkpoint-9"


@pytest.mark.parametrize("resume", ["auto", "true", "checkpoint-9"])
def test_another_model_or_layout_is_refused(run, resume):
    resume = resume if "-" not in resume else run / resume
    assert "holds another model: num_experts=4 there but 8 here" in chosen(run, resume, num_experts=8)
    assert "the training dtype must stay float32" in chosen(run, resume, layout=OTHER)


def test_checkpoint_that_is_taken_instead_must_fit_too(run):
    make(run, 6, OTHER)
    make(run, 9)
    flip(run / "checkpoint-9" / "latest")
    assert "checkpoint-6 was written by 8 processes" in chosen(run, "auto")


def test_weights_alone_are_passed_over(run):
    make(run, 12, weights_only=True)
    assert chosen(run, "auto") == "checkpoint-9"
    assert "holds weights only (--save_only_model); add --reset_optimizer" in chosen(run, run / "checkpoint-12")


# --------------------------------------------------------------------------------------------------------------------
# --reset_optimizer


def test_weights_are_taken_across_layouts_and_from_a_torn_state(run):
    make(run, 12, OTHER, weights_only=True)
    flip(run / "checkpoint-9" / "latest")
    for resume in (run / "checkpoint-12", "auto", "true"):
        assert chosen(run, resume, reset=True) == "checkpoint-12"
    assert chosen(run, run / "checkpoint-9", reset=True) == "checkpoint-9"


def test_torn_weights_are_not_taken(run):
    flip(run / "checkpoint-9" / "hf" / "model.safetensors")
    assert chosen(run, run / "checkpoint-9") == "checkpoint-9"
    assert "hf/model.safetensors is not what was saved" in chosen(run, run / "checkpoint-9", reset=True)
    assert chosen(run, "auto", reset=True) == "checkpoint-6"
    (run / "checkpoint-6" / "hf" / "model.safetensors").unlink()
    assert chosen(run, "auto", reset=True) == "checkpoint-3"
    assert "hf/model.safetensors is missing" in chosen(run, run / "checkpoint-6", reset=True)
    assert "There is no checkpoint at" in chosen(run, run / "checkpoint-7", reset=True)
    shutil.rmtree(run / "checkpoint-3" / "hf")
    write_manifest(run / "checkpoint-3", LAYOUT, small_config(), Progress(3))
    assert "has no hf folder, whose weights" in chosen(run, run / "checkpoint-3", reset=True)


def test_weights_of_another_model_are_not_taken(run):
    assert "holds another model: num_experts=4 there but 8 here" in chosen(run, "auto", reset=True, num_experts=8)


def test_reset_needs_a_checkpoint(run):
    with pytest.raises(ConfigError, match=r"--reset_optimizer needs --resume_from_checkpoint"):
        ResumeChoice(
            Namespace(output_dir=str(run), resume_from_checkpoint=None, reset_optimizer=True), LAYOUT, small_config()
        )
