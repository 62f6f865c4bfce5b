"""Parts of a stream: every document in one of them, each epoch in another order, and every place found again."""

import json
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from streams import number_of, source_of, text_of, write_files

from moe_hf.data import documents
from moe_hf.data.documents import DocumentReader
from moe_hf.errors import DataError


def numbers(reader: DocumentReader) -> list[int]:
    return [number_of(tokens) for tokens in reader]


@pytest.fixture
def source(tmp_path):
    """Return a function that opens files of so many documents as a source."""
    return lambda counts, **flags: source_of(tmp_path, write_files(tmp_path / "files", counts), **flags)


def test_without_a_buffer_documents_come_as_they_are(source):
    assert numbers(DocumentReader(source([300, 2, 301]), num_epochs=1)) == list(range(603))


@pytest.mark.parametrize("shuffle_buffer", [0, 4])
@pytest.mark.parametrize("counts", [[17], [9, 1, 14], [5, 6, 7, 8], [3, 4, 5, 6, 7, 2, 9]])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_are_disjoint_and_complete_in_each_epoch(num_parts, counts, shuffle_buffer, source):
    opened = source(counts)
    epochs = []
    for num_epochs in (1, 2):
        readers = [
            DocumentReader(opened, part, num_parts, seed=(3, 0), shuffle_buffer=shuffle_buffer, num_epochs=num_epochs)
            for part in range(num_parts)
        ]
        epochs.append([numbers(reader) for reader in readers])
    first, both = epochs
    second = [whole[len(one) :] for one, whole in zip(first, both, strict=True)]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(sum(counts)))  # noqa: RUF017
    assert (first != second) == bool(shuffle_buffer)


def test_files_are_dealt_out_whole_and_only_the_rest_is_read_by_all(source, monkeypatch):
    opened, read = source([4, 4, 4, 4, 4]), []
    shard = IterableDataset.shard
    monkeypatch.setattr(IterableDataset, "shard", lambda *a, **k: read.append(k["index"]) or shard(*a, **k))
    assert numbers(DocumentReader(opened, 1, 2, num_epochs=1)) == [4, 5, 6, 7, 12, 13, 14, 15, 17, 19]
    assert read == [1, 3, 4]


def test_what_is_held_out_belongs_to_no_part(source):
    opened = source([40, 3, 4], validation_split_percentage=50)
    parts = [numbers(DocumentReader(opened, part, 2, shuffle_buffer=8, num_epochs=1)) for part in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(20, 47))


def test_orders_depend_on_the_seed_and_are_not_those_of_the_files(source):
    opened = source([30, 30, 30])

    def order(seed: int) -> list[int]:
        return numbers(DocumentReader(opened, seed=(seed,), shuffle_buffer=10, num_epochs=1))

    assert order(1) == order(1)
    assert order(1) != order(2)
    begins = {tuple(sorted({number // 30 for number in order(seed)[:10]})) for seed in range(8)}
    assert len(begins) > 1, "the first file is always the same"


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv", "txt"])
def test_every_place_is_found_again(extension, num_parts, tmp_path):
    for index, count in enumerate((70, 45, 33)):
        texts = [text_of(100 * index + i) for i in range(count)]
        path, table = tmp_path / f"part{index}.{extension}", Dataset.from_dict({"text": texts})
        if extension == "txt":
            path.write_text("\n".join(texts))
        else:
            getattr(table, {"jsonl": "to_json"}.get(extension, f"to_{extension}"))(path)
    opened = source_of(tmp_path, f"{tmp_path}/part*.{extension}", validation_split_percentage=10)

    def reader() -> DocumentReader:
        return DocumentReader(opened, num_parts - 1, num_parts, seed=(5,), shuffle_buffer=45, num_epochs=2)

    whole, states, uninterrupted = [], [], reader()
    for tokens in uninterrupted:
        whole.append(number_of(tokens))
        states.append(json.dumps(uninterrupted.state_dict()))
    assert len(whole) > 100
    for place in range(0, len(states), 7):
        resumed = reader()
        resumed.load_state_dict(json.loads(states[place]))
        assert numbers(resumed) == whole[place + 1 :], place


def test_going_on_reads_one_chunk_again_and_not_what_came_before(source, monkeypatch):
    opened = source([1000] * 3)
    reader = DocumentReader(opened, shuffle_buffer=100)
    iterator = iter(reader)
    for _ in islice(iterator, 2350):
        pass
    place = reader.state_dict()
    following = number_of(next(iterator))
    encoded = []
    monkeypatch.setattr(documents, "islice", lambda rows, *limits: encoded.append(len(rows)) or islice(rows, *limits))
    resumed = DocumentReader(opened, shuffle_buffer=100)
    resumed.load_state_dict(place)
    assert number_of(next(iter(resumed))) == following
    assert sum(encoded) <= 32


def test_part_without_documents_is_refused(source):
    opened = source([2])
    with pytest.raises(DataError, match=r"part 3 of 3 of the training data .* has no document.* fewer processes"):
        next(iter(DocumentReader(opened, 2, 3)))


def test_lines_of_a_text_file_stay_together(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{text_of(i)}\n" for i in range(450)))
    opened = source_of(tmp_path, str(tmp_path / "a.txt"), packing="blocks")
    pieces = list(DocumentReader(opened, num_epochs=1))
    shuffled = list(DocumentReader(opened, shuffle_buffer=3, num_epochs=1))
    assert len(pieces) == 5
    assert [number_of(piece) for piece in pieces] == [0, 100, 200, 300, 400]
    assert sorted(map(list, shuffled)) == sorted(map(list, pieces)) and len(pieces[0]) > 200
    parts = [[number_of(piece) for piece in DocumentReader(opened, part, 2, num_epochs=1)] for part in range(2)]
    assert parts == [[0, 200, 400], [100, 300]]


def test_rows_are_counted_as_their_file_does(tmp_path):
    lines = [json.dumps({"text": text_of(i) if i != 7 else None}) for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    opened = source_of(tmp_path, str(tmp_path / "a.jsonl"), validation_split_percentage=30)
    with pytest.raises(DataError, match="row 8 of the training data"):
        list(DocumentReader(opened, num_epochs=1))
    with pytest.raises(DataError, match="row 8 of the training data"):
        list(DocumentReader(opened, 0, 2, num_epochs=1))


def test_rows_are_counted_on_after_going_on(tmp_path):
    lines = [json.dumps({"text": text_of(i) if i != 390 else None}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    opened = source_of(tmp_path, str(tmp_path / "a.jsonl"))
    reader = DocumentReader(opened)
    for _ in islice(reader, 300):
        pass
    resumed = DocumentReader(opened)
    resumed.load_state_dict(reader.state_dict())
    with pytest.raises(DataError, match="row 391 of the training data"):
        list(resumed)


def test_file_that_breaks_off_is_named(tmp_path, source):
    opened = source([5, 5])
    Path(tmp_path / "files" / "part01.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"training data .* cannot be read \(FileNotFoundError: .*part01.jsonl"
    ) as error:
        list(DocumentReader(opened, num_epochs=1))
    assert "\n" not in str(error.value)
