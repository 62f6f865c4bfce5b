"""What an earlier run has left is neither overwritten nor in the way of a command that is started again."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_hf.errors import ConfigError
from moe_hf.training.output_folder import RemoveEarlierRun, check_output_folder

LEFT = ["checkpoint-3", "hf", "metrics.jsonl", "trainer_state.json", "train_results.json", "all_results.json"]
HIDDEN = [".checkpoint-3.incomplete", ".checkpoint-3.replaced"]
MINE = ["notes.txt", "checkpoint-ideas", ".checkpoint-x", "my_hf", "results.json", "train_results.json.bak"]


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        if "." in name[1:] and not name.startswith(".checkpoint"):
            path.write_text("x")
        else:
            path.mkdir()


def refusal(folder: Path, **flags) -> str | None:
    values = {"do_train": True, "overwrite_output_dir": False, "resume_from_checkpoint": None}
    values |= {"output_dir": str(folder), "model_name_or_path": None, "tokenizer_name": None}
    try:
        check_output_folder(Namespace(**values | flags))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [*LEFT, "model-00001-of-00002.safetensors"])
def test_folder_with_results_is_refused(tmp_path, name):
    make(tmp_path, name, "notes.txt")
    assert refusal(tmp_path).startswith(f"--output_dir {tmp_path} already holds {name}; give another folder, continue")


def test_folder_of_other_things_is_not(tmp_path):
    make(tmp_path, *MINE, *HIDDEN)
    assert refusal(tmp_path) is None and refusal(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "flags",
    [{"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}, {"do_train": False}],
)
def test_those_who_know_may_go_on(tmp_path, flags):
    make(tmp_path, *LEFT, *HIDDEN)
    assert refusal(tmp_path, **flags) is None


def test_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    assert refusal(tmp_path / "out") == f"--output_dir {tmp_path / 'out'} is a file; give a folder."


@pytest.mark.parametrize("flag", ["model_name_or_path", "tokenizer_name"])
def test_what_is_still_to_be_read_is_not_deleted(tmp_path, flag):
    source = {flag: str(tmp_path / "hf")}
    assert f"would delete --{flag}" in refusal(tmp_path, overwrite_output_dir=True, **source)
    assert refusal(tmp_path, **source) is None
    assert refusal(tmp_path / "other", overwrite_output_dir=True, **source) is None


@pytest.mark.parametrize("should_save", [True, False])
def test_overwriting_deletes_what_a_run_leaves_and_nothing_else(tmp_path, should_save):
    make(tmp_path, *LEFT, *HIDDEN, *MINE)
    arguments = SimpleNamespace(should_save=should_save, output_dir=str(tmp_path))
    RemoveEarlierRun().on_train_begin(arguments, None, None)
    left = sorted(MINE if should_save else [*LEFT, *HIDDEN, *MINE])
    assert sorted(path.name for path in tmp_path.iterdir()) == left
