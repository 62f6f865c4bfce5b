"""Writing tokenized shards: what is in them, how much is in memory, and what an end before the end leaves."""

import os
from pathlib import Path

import datasets
import pytest
from tokenized_lab import EOS, IDS, VOCAB_SIZE, Lab, as_lists, make_texts, make_tokenizer

from moe_hf.data import packing, shard_writer, tokenizing
from moe_hf.data.tokenized_folder import read_record
from moe_hf.errors import ConfigError, DataError


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path, make_tokenizer())


@pytest.fixture
def many_borders(monkeypatch):
    """Few documents become many tasks, record batches, shards and batches that are cut, with unequal borders."""
    monkeypatch.setattr(tokenizing, "_ROWS_PER_TASK", 7)
    monkeypatch.setattr(shard_writer, "_TOKENS_PER_RECORD_BATCH", 90)
    monkeypatch.setattr(packing, "_BLOCKS_PER_BATCH", 5)


def test_rows_do_not_depend_on_the_size_of_shards(lab, many_borders):
    file = lab.write(make_texts(100))
    seen = []
    for shard_tokens in (1, 333, 10**9):
        record = lab.tokenize(file, shard_tokens)
        seen.append(as_lists(lab.open(16, packing="documents")[0]))
        files = [shard.file for shard in record.splits["train"].shards]
        assert (len(files) == 1) == (shard_tokens == 10**9)
        assert sorted(path.name for path in (lab.tokens / "train").iterdir()) == [Path(file).name for file in files]
        assert all(shard.num_tokens >= shard_tokens for shard in record.splits["train"].shards[:-1])
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 50


def test_stream_in_two_processes_gives_the_same_files_and_is_never_held_whole(lab, monkeypatch):
    monkeypatch.setattr(tokenizing, "_ROWS_PER_TASK", 5)
    texts = [text or "a" for text in make_texts(400)]
    lab.tokenize(lab.write(texts), shard_tokens=3000, validation_split_percentage=10)
    expected = {path: path.read_bytes() for path in lab.tokens.glob("*/*.arrow")}
    assert len(expected) > 3

    read, written, ahead = [], [], []
    write = shard_writer.ShardWriter.write
    real_work = tokenizing._read

    def count_read(*arguments):
        for first, batch in real_work(*arguments):
            read.append(len(batch["text"]))
            yield first, batch

    def count_written(self, tokens, lengths):
        ahead.append(sum(read) - sum(written))
        written.append(len(lengths))
        write(self, tokens, lengths)

    monkeypatch.setattr(tokenizing, "_read", count_read)
    monkeypatch.setattr(shard_writer.ShardWriter, "write", count_written)
    flags = {"streaming": True, "validation_split_percentage": 10}
    lab.tokenize(lab.folder / "text.jsonl", shard_tokens=3000, num_proc=2, **flags)
    assert {path: path.read_bytes() for path in lab.tokens.glob("*/*.arrow")} == expected
    assert sum(read) == sum(written) == 400
    assert 5 < max(ahead) <= 2 * 2 * 5  # two tasks for each process, of 80 in all


def test_mistakes_in_other_processes_are_one_sentence(lab):
    file = lab.write(["abc"] * 300)
    with file.open("a") as stream:
        stream.write('{"text": null}\n')
    with pytest.raises(DataError, match=r"^row 301 of the training data .* holds null instead of a string$"):
        lab.tokenize(file, num_proc=2)
    with pytest.raises(DataError, match="a process that tokenizes was killed, perhaps because memory ran out"):
        list(tokenizing._in_order(os._exit, range(9), 2))


@pytest.mark.parametrize(("num_words", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_two_bytes_when_they_fit(lab, num_words, dtype):
    lab.tokenizer = make_tokenizer(IDS | {f"w{i}": i for i in range(VOCAB_SIZE, num_words - 1)} | {"ß": num_words - 1})
    record = lab.tokenize(lab.write(["aßb" * 10]))
    assert (record.dtype, record.vocab_size) == (dtype, num_words)
    assert lab.open(3, vocab_size=num_words)[0][0]["input_ids"].tolist() == [1, num_words - 1, 2]


def test_other_programs_read_the_files(lab):
    lab.tokenize(lab.write(["abc", "de"]), shard_tokens=1)
    loaded = datasets.load_dataset(
        "arrow", data_files=str(lab.tokens / "train" / "*.arrow"), split="train", cache_dir=str(lab.folder / "cache")
    )
    assert loaded["input_ids"] == [[1, 2, 3, EOS], [4, 5, EOS]]


def test_nothing_is_left_of_what_was_interrupted(lab, monkeypatch):
    file = lab.write(make_texts(20))
    written = []

    def interrupt(self):
        written.append(self.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_writer.ShardWriter, "_close_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab.tokenize(file)
    assert written and sorted(path.name for path in lab.folder.iterdir()) == ["cache", "text.jsonl"]


def test_what_is_there_stays_until_its_successor_is_whole(lab):
    first = lab.tokenize(lab.write(["abc"]))
    bad = lab.folder / "bad.jsonl"
    bad.write_text('{"text": "abc"}\n{"text": 7}\n')
    with pytest.raises(DataError, match=r"bad.jsonl"):
        lab.tokenize(bad)
    assert read_record(lab.tokens) == first
    with pytest.raises(ConfigError, match=r"is already there; give a new folder, or add --overwrite"):
        lab.tokenize(lab.folder / "text.jsonl", overwrite=False)
    lab.tokenize(lab.write(["abcd"]))
    assert read_record(lab.tokens).splits["train"].num_tokens == 5


def test_folders_of_others_are_never_overwritten(lab):
    lab.tokens.mkdir()
    (lab.tokens / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ConfigError, match="holds something else; give a new folder"):
        lab.tokenize(lab.write(["abc"]), overwrite=True)
    assert (lab.tokens / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": ""}\n{"text": " "}\n', "holds no text"),
        ('{"input_ids": [1, 2]}\n', "holds input_ids already; train on it as it is"),
        ('{"text": null}\n{"text": "a"}\n', "row 1 of the training data"),
    ],
)
def test_data_without_text(lab, content, sentence):
    file = lab.folder / "text.jsonl"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        lab.tokenize(file)
    assert sentence in str(caught.value) and not lab.tokens.exists()
