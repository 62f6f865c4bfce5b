"""`moe-hf tokenize`: what it prints, what it refuses, and what it leaves when it is stopped."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, environment, hear_ctrl_c
from small import save_tokenizer

from moe_hf import cli
from moe_hf.commands import tokenize
from moe_hf.data.tokenized_folder import read_record


@pytest.fixture(autouse=True)
def only_this_command(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", (tokenize,))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with `tokenizer/` and ten documents of five words in `text.jsonl`."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    write_documents(tmp_path / "text.jsonl", 10)
    return tmp_path


def write_documents(path: Path, count: int) -> None:
    path.write_text((json.dumps({"text": "w3 w4 w5 w6 w7"}) + "\n") * count)


def words(**changes) -> list[str]:
    values = {
        "tokenizer_name": "tokenizer",
        "output_dir": "tokens",
        "train_file": "text.jsonl",
        "cache_dir": "cache",
    } | changes
    return ["tokenize", *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def refused(capsys, *arguments: str) -> str:
    """Run a command line that has to be refused, and return its one sentence."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_says_what_it_has_written(folder, capsys):
    cli.main(words(validation_split_percentage=20, shard_size="0.5K"))
    size = {name: (folder / "tokens" / name / "00000.arrow").stat().st_size for name in ("train", "validation")}
    assert capsys.readouterr().out.splitlines() == [
        f"train: 48 tokens of 8 documents, {size['train'] / 48:.3f} bytes per token, files: 1",
        f"validation: 12 tokens of 2 documents, {size['validation'] / 12:.3f} bytes per token, files: 1",
        "Train on them with: run_clm_moe.py --tokenized_data tokens",
    ]


def test_flags_are_those_of_training(folder):
    write_documents(folder / "more.jsonl", 3)
    cli.main([*words(validation_file="more.jsonl", append_eos="False"), "--streaming"])
    record = read_record("tokens")
    assert {name: split.num_tokens for name, split in record.splits.items()} == {"train": 50, "validation": 15}
    assert record.eos_token_id is None


def test_embedded_corpus_without_a_source(folder, monkeypatch):
    monkeypatch.setattr("moe_hf.data.files.write_corpus", lambda cache_dir: ("text.jsonl", "text.jsonl"))
    cli.main(words(train_file=None))
    assert read_record("tokens").splits["train"].source == "the embedded corpus"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shard_size": "1G"}, "--shard_size 1G must be a number of tokens, such as 500K, 100M or 2B."),
        ({"shard_size": "0"}, "--shard_size 0 must be a number of tokens, such as 500K, 100M or 2B."),
        ({"num_proc": "0"}, "--num_proc 0 must be at least 1."),
        ({"tokenizer_name": "not/a/folder"}, "--tokenizer_name not/a/folder cannot be loaded: "),
        ({"train_file": "nothing.jsonl"}, "train_file 'nothing.jsonl' does not exist; give the path of"),
        ({"validation_split_percentage": "101"}, "validation_split_percentage=101 is out of range; use 0 to 100"),
        ({"text_column": "body"}, "text_column='body' is not in the training data, which has: text"),
        ({"output_dir": "tokenizer"}, "--output_dir tokenizer is there and holds something else; give a new folder."),
        ({"output_dir": "text.jsonl"}, "--output_dir text.jsonl is there and holds something else; give a new"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, changes, sentence):
    assert refused(capsys, *words(**changes)).startswith(f"error: {sentence}")
    assert not (folder / "tokens").exists()


def test_needs_a_tokenizer(folder, capsys):
    assert "--tokenizer_name" in refused(capsys, *words(tokenizer_name=None))


def test_what_is_there_is_replaced_only_when_told(folder, capsys):
    cli.main(words())
    sentence = refused(capsys, *words())
    assert sentence == "error: --output_dir tokens is already there; give a new folder, or add --overwrite."
    write_documents(folder / "text.jsonl", 40)
    cli.main([*words(), "--overwrite"])
    assert read_record("tokens").splits["train"].num_documents == 38


def test_what_a_killed_run_has_left_is_not_in_the_way(folder):
    left = folder / ".tokens.incomplete" / "train"
    left.mkdir(parents=True)
    (left / "00007.arrow").write_bytes(b"half")
    cli.main(words())
    assert sorted(path.name for path in (folder / "tokens" / "train").iterdir()) == ["00000.arrow"]
    assert not left.parent.exists()


def test_a_full_disk_is_one_sentence(folder, capsys):
    write_documents(folder / "text.jsonl", 30_000)
    before = sorted(path.name for path in folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        sentence = refused(capsys, *words(cache_dir=None), "--streaming", "--shard_size=100K")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sentence.startswith("error: --output_dir tokens was not written: ") and "File too large" in sentence
    assert sorted(path.name for path in folder.iterdir()) == before


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_ctrl_c_leaves_nothing_and_no_process(folder):
    # Millions of documents: it does not end by itself.
    write_documents(folder / "text.jsonl", 20_000)
    for number in range(500):
        (folder / f"{number}.jsonl").symlink_to("text.jsonl")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "moe_hf",
            *words(train_file="[0-9]*.jsonl"),
            "--streaming",
            "--num_proc=2",
            "--shard_size=50K",
        ],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    first_shard = folder / ".tokens.incomplete" / "train" / "00000.arrow"
    wait_for(lambda: first_shard.exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed[-2000:]
    assert "Traceback" not in printed
    assert not (folder / "tokens").exists() and not first_shard.parent.parent.exists()
    wait_for(lambda: not any_process_in(process.pid))


def any_process_in(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
