"""Tokenized shards give the rows that packing the same text gives."""

import pickle

import pytest
from small import save_tokenizer, small_config
from tokenized_lab import EOS, IDS, VOCAB_SIZE, Lab, as_lists, make_texts, make_tokenizer
from tokenizers import pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_hf.data import packing, shard_writer, tokenizing
from moe_hf.data.tokenized_folder import read_record, tokenizer_fingerprint
from moe_hf.errors import DataError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import train_and_export


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path, make_tokenizer())


@pytest.fixture
def many_borders(monkeypatch):
    """Few documents become many tasks, record batches, shards and batches that are cut, with unequal borders."""
    monkeypatch.setattr(tokenizing, "_ROWS_PER_TASK", 7)
    monkeypatch.setattr(shard_writer, "_TOKENS_PER_RECORD_BATCH", 90)
    monkeypatch.setattr(packing, "_BLOCKS_PER_BATCH", 5)


@pytest.mark.parametrize("shape", ["blocks", "documents"])
@pytest.mark.parametrize("block_size", [2, 16, 61])
def test_rows_are_those_of_the_text(lab, many_borders, shape, block_size):
    file = lab.write(make_texts(150))
    lab.tokenize(file)
    assert len(read_record(lab.tokens).splits["train"].shards) > 5
    expected = as_lists(lab.pack(file, block_size, packing=shape)[0])
    assert len(expected) > 10
    assert as_lists(lab.open(block_size, packing=shape)[0]) == expected


def test_documents_are_joined_with_eos_and_cut(lab):
    lab.tokenize(lab.write(["abc", "", "de", "f"]))
    # a b c . d | e . f .
    rows = as_lists(lab.open(4, packing="documents")[0])
    assert rows == [
        {"input_ids": [1, 2, 3, EOS], "position_ids": [0, 1, 2, 3], "labels": [-100, 2, 3, EOS]},
        {"input_ids": [4, 5, EOS, 6], "position_ids": [0, 1, 2, 0], "labels": [-100, 5, EOS, -100]},
    ]
    # The one token that is left over is not there, but no other is lost.
    assert as_lists(lab.open(2)[0]) == [{"input_ids": ids} for ids in ([1, 2], [3, EOS], [4, 5], [EOS, 6])]


def test_lines_are_joined_without_eos(lab, many_borders):
    file = lab.write(make_texts(60), "text.txt")
    lab.tokenize(file)
    expected = as_lists(lab.pack(file, 16)[0])
    rows = as_lists(lab.open(16)[0])
    assert rows == expected and not any(EOS in row["input_ids"] for row in rows)
    with pytest.raises(DataError, match=r"packing='documents' .* tokenized_data .* was made of lines"):
        lab.open(16, packing="documents")


@pytest.mark.parametrize("own_file", [False, True])
def test_validation_split_is_that_of_the_text(lab, many_borders, own_file):
    file = lab.write(make_texts(120))
    held_out = {"validation_split_percentage": 20}
    if own_file:
        held_out = {"validation_file": str(lab.write(make_texts(30, 90), "validation.jsonl"))}
    lab.tokenize(file, **held_out)
    expected = [as_lists(rows) for rows in lab.pack(file, 16, do_eval=True, **held_out)]
    assert [as_lists(rows) for rows in lab.open(16, do_eval=True)] == expected
    train, validation = lab.open(16, do_eval=True, max_train_samples=9, max_eval_samples=4)
    assert (as_lists(train), as_lists(validation)) == (expected[0][:9], expected[1][:4])
    assert len(lab.open(16, max_train_samples=10**6)[0]) == len(expected[0])


def test_workers_get_the_files_and_not_the_data(lab):
    lab.tokenize(lab.write(make_texts(300, 2000)), shard_tokens=100_000)
    rows = lab.open(512)[0]
    pickled = pickle.dumps(rows)
    assert read_record(lab.tokens).splits["train"].num_tokens * 2 > 50 * len(pickled)
    assert as_lists(pickle.loads(pickled)) == as_lists(rows)
    loader = DataLoader(rows, batch_size=64, num_workers=2, collate_fn=list)
    read = [row["input_ids"].tolist() for batch in loader for row in batch]
    assert read == [row["input_ids"] for row in as_lists(rows)]


def test_index_out_of_range(lab):
    lab.tokenize(lab.write(["abc", "de"]))
    rows = lab.open(3)[0]
    assert len(rows) == 2
    for index in (2, -1):
        with pytest.raises(IndexError):
            rows[index]


def test_too_few_tokens(lab):
    lab.tokenize(lab.write(["abc", "de"]))
    with pytest.raises(DataError, match="holds 7 of the 8 tokens that one row needs"):
        lab.open(8)


def test_no_validation_split(lab):
    lab.tokenize(lab.write(["abc", "de"]))
    with pytest.raises(DataError, match="has no validation split; give moe-hf tokenize a validation_file"):
        lab.open(3, do_eval=True)


class TestTokenizers:
    def test_copies_have_the_same_fingerprint(self, lab):
        lab.tokenize(lab.write(["abc"]))
        copy = PreTrainedTokenizerFast.from_pretrained(lab.tokens / "tokenizer")
        assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(lab.tokenizer)
        assert len(lab.open(2, use=copy)[0]) == 2
        # What fills rows up is no part of the tokens.
        assert len(lab.open(2, use=make_tokenizer(pad_token="a"))[0]) == 2

    def test_another_tokenizer_is_refused(self, lab):
        lab.tokenize(lab.write(["abc"]))
        swapped = IDS | {"a": IDS["b"], "b": IDS["a"]}
        unsplit = make_tokenizer()
        unsplit.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        for other in (make_tokenizer(swapped), make_tokenizer(eos_token="z"), unsplit):
            with pytest.raises(DataError, match=r"was made with the tokenizer .*; use tokenizer_name='.*tokens/tok"):
                lab.open(2, use=other)

    def test_too_small_a_model_is_refused(self, lab):
        lab.tokenize(lab.write(["abc"]))
        assert lab.open(2, vocab_size=VOCAB_SIZE)
        with pytest.raises(DataError, match="has token ids up to 28, but the model's vocab_size is 28; use a"):
            lab.open(2, vocab_size=28)

    def test_append_eos_needs_one(self, lab):
        file = lab.write(["abc"])
        lab.tokenizer = make_tokenizer(eos_token=None)
        with pytest.raises(DataError, match="append_eos=True needs an eos token"):
            lab.tokenize(file)
        assert not lab.tokens.exists()
        assert lab.tokenize(file, append_eos=False).splits["train"].num_tokens == 3


def test_run_takes_the_tokenizer_beside_the_tokens(lab, no_state_of_earlier_runs):
    save_tokenizer(lab.folder / "words")
    lab.tokenizer = AutoTokenizer.from_pretrained(lab.folder / "words")
    lab.tokenize(lab.write(["w3 w4 w5 w6 w7 w8 w9"] * 20), validation_split_percentage=20)
    small_config().save_pretrained(lab.folder / "config")
    values = {
        "config_name": lab.folder / "config" / "config.json",
        "tokenized_data": lab.tokens,
        "output_dir": lab.folder / "run",
        "block_size": 8,
        "max_steps": 2,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    argv = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    metrics = train_and_export(argv, FailureRelay(), None)
    assert 0 < metrics["train_loss"] < 10 and 0 < metrics["eval_loss"] < 10
    assert AutoTokenizer.from_pretrained(lab.folder / "run" / "hf").get_vocab() == lab.tokenizer.get_vocab()
    card = (lab.folder / "run" / "hf" / "README.md").read_text()
    assert "128 tokens of `tokens`" in card and "validation split of `tokens`" in card
