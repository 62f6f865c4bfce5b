"""The embedded corpus and its tokenizer."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from moe_hf.data import corpus
from moe_hf.data.corpus import load_or_train_tokenizer, train_tokenizer, write_corpus
from moe_hf.errors import DataError

NASTY = "def f(x):\n\treturn  x , 'é√ 日本 🦜' # \x00\r\n    pass  \n"


def read(path: str) -> list[str]:
    return pq.read_table(path).column("text").to_pylist()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of 45 modules and of files that do not belong into the corpus."""
    root = tmp_path / "library"
    for i in range(45):
        file = root / f"package{i % 3}" / f"module{i:02}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"value = {i}\n")
    for skipped in ("site-packages/a.py", "test/b.py", "package0/tests/c.py", "encodings/d.py", "e.txt"):
        (root / skipped).parent.mkdir(parents=True, exist_ok=True)
        (root / skipped).write_text("unwanted")
    (root / "package0" / "zz_copy.py").write_text("value = 0\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "empty.py").write_text("")
    (root / "broken_link.py").symlink_to(root / "nowhere.py")
    return root


def test_corpus_has_every_module_once_and_every_twentieth_for_validation(library, tmp_path):
    train, validation = write_corpus(tmp_path / "cache", library)
    paths = sorted(f"package{i % 3}/module{i:02}.py" for i in range(45))
    texts = [f"value = {int(path[-5:-3])}\n" for path in paths]
    assert read(validation) == [texts[19], texts[39]]
    assert read(train) == [text for text in texts if text not in (texts[19], texts[39])]


def test_corpus_is_written_once_and_again_when_the_library_changes(library, tmp_path):
    first = write_corpus(tmp_path / "cache", library)
    written = os.stat(first[0]).st_mtime_ns
    assert write_corpus(tmp_path / "cache", library) == first
    assert os.stat(first[0]).st_mtime_ns == written
    (library / "new.py").write_text("new = True\n")
    second = write_corpus(tmp_path / "cache", library)
    assert second != first
    assert "new = True\n" in read(second[0])


def test_processes_that_write_at_once_agree(library, tmp_path, monkeypatch):
    """All of them find nothing and write; one folder remains, whole, and nothing beside it."""
    barrier = threading.Barrier(4)
    publish = corpus._publish_folder

    def publish_together(target):
        barrier.wait(timeout=10)
        return publish(target)

    monkeypatch.setattr(corpus, "_publish_folder", publish_together)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: write_corpus(tmp_path / "cache", library), range(4)))
    assert len(set(results)) == 1
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [Path(results[0][0]).parent.name]
    assert len(read(results[0][0])) == 43


def test_failed_writer_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), corpus._publish_folder(tmp_path / "cache" / "target") as private:
        (private / "half").write_text("...")
        raise RuntimeError
    assert list((tmp_path / "cache").iterdir()) == []


def test_library_without_sources_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no source files; give train_file"):
        write_corpus(tmp_path / "cache", tmp_path)


def test_few_files_still_give_both_splits(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(name)
    train, validation = write_corpus(tmp_path / "cache", tmp_path)
    assert (read(train), read(validation)) == (["a", "b"], ["c"])


def test_standard_library_is_large_enough_to_train_on(tmp_path):
    train, validation = write_corpus(tmp_path)
    size, held_out = (sum(map(len, read(path))) for path in (train, validation))
    assert 5_000_000 < size < 30_000_000
    assert 0.01 < held_out / size < 0.1


@pytest.mark.parametrize(("wanted", "expected"), [(1, 384), (384, 384), (385, 512), (1000, 1024)])
def test_vocabulary_is_a_multiple_of_128_even_for_tiny_texts(wanted, expected, tmp_path):
    tokenizer = train_tokenizer(["tiny text, tiny text"], wanted)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(loaded) == expected
    assert set(loaded.get_vocab().values()) == set(range(expected))


def test_every_text_survives_the_tokenizer():
    tokenizer = train_tokenizer([NASTY * 3], 512)
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.decode(tokenizer(NASTY)["input_ids"]) == NASTY
    unseen = "".join(map(chr, range(32, 700)))
    assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen


def test_end_of_text_is_bos_eos_and_pad():
    tokenizer = train_tokenizer(["text"], 384)
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert ids == {tokenizer("<|endoftext|>")["input_ids"][0]} == {0}
    assert tokenizer("text", add_special_tokens=True)["input_ids"][-1] != 0


def test_training_reads_a_bounded_amount_of_text(monkeypatch):
    monkeypatch.setattr(corpus, "MAX_TRAINING_CHARS", 10)

    def texts():
        yield "aaaa"
        yield "b" * 100
        pytest.fail("read on although ten characters were reached")

    train_tokenizer(texts(), 384)


def test_tokenizer_is_trained_once_per_size(tmp_path, library, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
    first = load_or_train_tokenizer(tmp_path / "cache", 384)
    assert len(load_or_train_tokenizer(tmp_path / "cache", 500)) == 512

    def refuse(*args):
        pytest.fail("trained again although the tokenizer is cached")

    monkeypatch.setattr(corpus, "train_tokenizer", refuse)
    second = load_or_train_tokenizer(tmp_path / "cache", 384)
    assert second.get_vocab() == first.get_vocab()
    # 300 tokens round up to the same 384.
    assert len(load_or_train_tokenizer(tmp_path / "cache", 300)) == 384
