"""Folders of tokenized shards that are not whole, and flags that do not go with them, are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenized_lab import Lab, make_tokenizer

from moe_hf.data import tokenizing
from moe_hf.data.arguments import DataArguments, check_data_arguments
from moe_hf.errors import DataError


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path, make_tokenizer())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"train_file": "x.jsonl"}, "train_file='x.jsonl' has no effect with tokenized_data="),
        ({"validation_file": "x.jsonl"}, "validation_file='x.jsonl' has no effect"),
        ({"dataset_name": "owner/name"}, "dataset_name='owner/name' has no effect"),
        ({"dataset_mixture": "x.yaml"}, "dataset_mixture='x.yaml' has no effect"),
        ({"streaming": True}, "streaming=True has no effect"),
        ({"append_eos": False}, "append_eos=False has no effect"),
        ({"validation_split_percentage": 1}, "validation_split_percentage=1 has no effect"),
        ({"packing": "pad"}, "packing='pad' does not go with tokenized_data"),
    ],
)
def test_flags_that_contradict_it(lab, flags, sentence):
    lab.tokenize(lab.write(["abc", "de"]))
    with pytest.raises(DataError) as caught:
        check_data_arguments(DataArguments(tokenized_data=str(lab.tokens), **flags))
    assert sentence in str(caught.value)


def change_record(tokens: Path, **changes) -> None:
    path = tokens / "tokens.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (record | changes).items() if v is not None}))


def replace_in_record(tokens: Path, old: str, new: str) -> None:
    path = tokens / "tokens.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def shard(tokens: Path) -> Path:
    return tokens / "train" / "00001.arrow"


def overwrite_bytes(path: Path, begin: int, count: int, byte: bytes) -> None:
    content = path.read_bytes()
    begin %= len(content)
    path.write_bytes(content[:begin] + byte * count + content[begin + count :])


DAMAGES = {
    "no folder": (shutil.rmtree, "is not a folder; give one that moe-hf tokenize has written"),
    "no record": (lambda tokens: (tokens / "tokens.json").unlink(), "has no tokens.json, so moe-hf tokenize has not"),
    "half a record": (lambda tokens: (tokens / "tokens.json").write_text('{"format": 1'), "is damaged"),
    "a list": (lambda tokens: (tokens / "tokens.json").write_text("[1]"), "is damaged"),
    "missing key": (lambda tokens: change_record(tokens, splits=None), "is damaged ('splits')"),
    "newer version": (lambda tokens: change_record(tokens, format=2), "has the format 2, and this version of moe_hf"),
    "missing shard": (lambda tokens: shard(tokens).unlink(), "lacks train/00001.arrow"),
    "cut off": (lambda tokens: shard(tokens).write_bytes(shard(tokens).read_bytes()[:-1]), "so it is cut off"),
    "no Arrow": (lambda tokens: overwrite_bytes(shard(tokens), 0, 64, b"x"), "00001.arrow cannot be read"),
    "other counts": (
        lambda tokens: replace_in_record(tokens, '"num_documents": 128', '"num_documents": 127'),
        "00000.arrow does not hold what tokens.json says",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_when_it_is_opened(lab, damage):
    break_it, sentence = DAMAGES[damage]
    tokenize_two_shards(lab)
    assert len(lab.open(4)[0]) > 50
    break_it(lab.tokens)
    with pytest.raises(DataError) as caught:
        lab.open(4)
    assert sentence in str(caught.value)


def tokenize_two_shards(lab: Lab) -> None:
    texts = ["abc" * 10] * tokenizing._ROWS_PER_TASK + ["abcd" * 10] * tokenizing._ROWS_PER_TASK
    record = lab.tokenize(lab.write(texts), shard_tokens=1000)
    assert len(record.splits["train"].shards) == 2


def test_ids_outside_the_vocabulary_are_seen_when_they_are_read(lab):
    lab.tokenize(lab.write(["abcdefgh" * 100]))
    path = lab.tokens / "train" / "00000.arrow"
    begin = path.read_bytes().index(np.array([1, 2, 3, 4], "<u2").tobytes())
    overwrite_bytes(path, begin + 8 * 2, 2, b"\xff")
    rows = lab.open(4)[0]
    assert rows[0]["input_ids"].tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match="is damaged: row 2 holds 4 tokens up to id 65535, where 4 below 29 must be"):
        rows[2]
