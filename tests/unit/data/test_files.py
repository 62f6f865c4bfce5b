"""Raw data: which rows are read, how they are divided, and what users are told about their mistakes."""

import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from moe_hf.data.arguments import DataArguments, check_data_arguments
from moe_hf.data.files import load_raw_splits, resolve_text_column
from moe_hf.errors import DataError

DOCUMENTS = ["first document", 'second, with "quotes" and a comma', "dritter: äöü 🦜"]


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a file below `tmp_path` and returns its path."""

    def write_file(name: str, content: str | bytes | list[str]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps({"text": text}) + "\n" for text in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture
def load(tmp_path: Path):
    """Return a function that loads training and validation rows, with its caches below `tmp_path`."""

    def load_splits(do_train: bool = True, do_eval: bool = False, **kwargs):
        data_args = DataArguments(cache_dir=str(tmp_path / "cache"), **kwargs)
        check_data_arguments(data_args)
        return load_raw_splits(data_args, do_train=do_train, do_eval=do_eval)

    return load_splits


def texts(split) -> list[str]:
    return [row["text"] for row in split.dataset]


def test_flags_are_parsed_like_those_of_run_clm():
    words = "--train_file a.txt --block_size 64 --no_append_eos --streaming --max_train_samples 3 --overwrite_cache"
    (data_args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(words.split())
    assert (data_args.train_file, data_args.block_size, data_args.max_train_samples) == ("a.txt", 64, 3)
    assert (data_args.append_eos, data_args.streaming, data_args.overwrite_cache) == (False, True, True)
    assert HfArgumentParser(DataArguments).format_help()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["json", "jsonl", "csv", "parquet", "document.json"])
def test_every_format_gives_the_same_documents(extension, streaming, write, load, tmp_path):
    path = tmp_path / f"data.{extension}"
    table = Dataset.from_dict({"text": DOCUMENTS})
    if extension == "csv":
        table.to_csv(path)
    elif extension == "parquet":
        table.to_parquet(path)
    elif extension == "document.json":
        write(path.name, json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
    else:
        write(path.name, DOCUMENTS)
    train, validation = load(train_file=str(path), validation_split_percentage=0, streaming=streaming)
    assert texts(train) == DOCUMENTS
    assert validation is None
    assert not train.is_lines


def test_lines_of_text_join_to_the_file(write, load):
    content = "title\n\n  indented\x0cfeed\u2028separator\n\nlast without a break"
    train, _ = load(train_file=write("a.txt", content), validation_split_percentage=0)
    assert train.is_lines
    assert len(texts(train)) == 5
    assert "".join(texts(train)) == content


def test_several_files_come_in_sorted_order(write, load):
    for name in ("10", "2", "1"):
        write(f"part{name}.jsonl", [name])
    folder = Path(write("other.jsonl", ["other"])).parent
    train, _ = load(train_file=f"{folder}/part*.jsonl", validation_split_percentage=0)
    assert texts(train) == ["1", "10", "2"]
    train, _ = load(train_file=f"{folder}/other.jsonl {folder}/part2.jsonl", validation_split_percentage=0)
    assert texts(train) == ["other", "2"]


@pytest.mark.parametrize("name", ["part[1].jsonl", "with space.jsonl", "star*.jsonl"])
def test_path_that_looks_like_a_pattern_is_a_path(name, write, load):
    train, _ = load(train_file=write(name, DOCUMENTS), validation_split_percentage=0)
    assert texts(train) == DOCUMENTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": "{}/no.txt"}, "train_file '{}/no.txt' does not exist"),
        ({"validation_file": "{}/no.txt"}, "validation_file '{}/no.txt' does not exist"),
        ({"train_file": "{}/*.json"}, "train_file '{}/*.json' matches no file"),
        ({"train_file": "{}"}, "train_file '{}' is a folder; give a file or a glob such as '{}/*.jsonl'"),
        ({"train_file": "{}/empty.txt"}, "train_file '{}/empty.txt' is empty"),
        ({"train_file": "{}/a.pdf"}, "a.pdf' has an unsupported extension; use one of .txt, .json, .jsonl, .csv, .par"),
        ({"train_file": "{}/a.*l {}/a.txt"}, "mixes .jsonl and .txt files"),
        ({"train_file": "{}/a.txt", "packing": "documents"}, "packing='documents' needs to know where documents end"),
        ({"validation_file": "{}/a.txt", "packing": "documents"}, "use .jsonl or .parquet"),
        ({"packing": "best"}, "packing='best' is unknown; use one of blocks, documents, pad"),
        ({"validation_split_percentage": -1}, "validation_split_percentage=-1 is out of range; use 0 to 100"),
        ({"validation_split_percentage": 101}, "validation_split_percentage=101 is out of range"),
        ({"block_size": 1}, "block_size=1 leaves no next token"),
        ({"max_train_samples": 0}, "max_train_samples=0 is out of range"),
        ({"max_eval_samples": -2}, "max_eval_samples=-2 is out of range"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers=0 is out of range"),
        ({"streaming_shuffle_buffer": -1}, "streaming_shuffle_buffer=-1 is negative"),
        ({"dataset_name": "wiki", "train_file": "{}/a.txt"}, "dataset_name='wiki' and train_file='{}/a.txt' both"),
        ({"dataset_name": "{}/none"}, "dataset_name '{}/none' does not exist"),
        ({"dataset_config_name": "en"}, "dataset_config_name='en' has no effect alone"),
    ],
)
def test_mistakes_that_need_no_loading(changes, message, write, tmp_path, monkeypatch):
    write("empty.txt", "")
    write("a.pdf", "x")
    write("a.txt", "x")
    write("a.jsonl", ["x"])
    for reader in ("from_text", "from_json"):
        monkeypatch.setattr(Dataset, reader, lambda *args, **kwargs: pytest.fail("loaded data"))
    changes = {
        name: value.format(tmp_path, tmp_path) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(DataError) as error:
        check_data_arguments(DataArguments(**changes))
    assert message.format(tmp_path, tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_good_arguments_pass_the_check(write):
    check_data_arguments(DataArguments())
    write("b.jsonl", ["x"])
    path = write("a.JSON", ["x"])
    check_data_arguments(DataArguments(train_file=path, validation_file=path, packing="documents", block_size=2))
    check_data_arguments(DataArguments(train_file=f"{Path(path).parent}/*.[jJ]*"))
    check_data_arguments(DataArguments(dataset_name="wikitext", dataset_config_name="en"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"text": oops}\n', "line 4: invalid JSON"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b', "line 2: invalid JSON"),
        ("array.jsonl", '{"text": "a"}\n["b"]\n', "line 2: a JSON list"),
        ("document.json", '[\n {"text": "a"},\n {"text" "b"}\n]', "line 3: invalid JSON"),
        ("latin.txt", b"fine\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        ("latin.json", b'[{"text": "a"},\n\n{"text": "\xe9"}]', "line 3: byte 0xe9 is not UTF-8"),
        ("quote.csv", 'text,n\n"a,1\n', "cannot be read as csv"),
        ("no.parquet", "plain text", "cannot be read as parquet"),
        ("header.csv", "text\n", "has no rows"),
    ],
)
def test_broken_file_is_named_with_its_line(name, content, message, streaming, write, load):
    path = write(name, content)
    with pytest.raises(DataError) as error:
        load(train_file=path, streaming=streaming)
    assert repr(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_file_is_found_among_others(write, load):
    write("part0.jsonl", ["a", "b"])
    path = write("part1.jsonl", '{"text": "a"}\n{"text": }\n')
    with pytest.raises(DataError, match=r"part1.jsonl', line 2: invalid JSON"):
        load(train_file=f"{Path(path).parent}/part*.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_text_column(streaming, write, load):
    def column_of(row: dict, requested: str | None = None) -> str:
        path = write("columns.jsonl", json.dumps(row) + "\n")
        return resolve_text_column(load(train_file=path, streaming=streaming)[0], requested)

    assert column_of({"id": 1, "text": "a", "title": "b"}) == "text"
    assert column_of({"id": 1, "content": "a"}) == "content"
    assert column_of({"text": "a", "title": "b"}, "title") == "title"
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of its columns: title, content"):
        column_of({"title": "a", "content": "b"})
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of its columns: id"):
        column_of({"id": 1})
    with pytest.raises(DataError, match="text_column='body' is not in the training data, which has: id, text"):
        column_of({"id": 1, "text": "a"}, "body")


@pytest.mark.parametrize(
    ("num_rows", "percentage", "num_held_out"),
    [(100, 5, 5), (10, 5, 1), (2, 50, 1), (7, 50, 3), (3, 99, 2), (40, 99, 39)],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_validation_is_the_first_percent_of_the_training_data(
    num_rows, percentage, num_held_out, streaming, write, load
):
    rows = [f"row {i}" for i in range(num_rows)]
    kwargs = {"train_file": write("a.jsonl", rows), "validation_split_percentage": percentage, "streaming": streaming}
    train, validation = load(do_eval=True, **kwargs)
    assert texts(validation) == rows[:num_held_out]
    assert texts(train) == rows[num_held_out:]
    assert train.first_row == num_held_out
    # Whether a run evaluates or trains changes nothing about which rows are whose.
    only_train, nothing = load(do_eval=False, **kwargs)
    assert (texts(only_train), nothing) == (rows[num_held_out:], None)
    nothing, only_validation = load(do_train=False, do_eval=True, **kwargs)
    assert (nothing, texts(only_validation)) == (None, rows[:num_held_out])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_of_many_files_never_trains_on_held_out_rows(num_workers, write, load):
    rows = [[f"file {i} row {j}" for j in range(6)] for i in range(5)]
    paths = [write(f"part{i}.jsonl", rows[i]) for i in range(5)]
    train, validation = load(
        do_eval=True, train_file=f"{Path(paths[0]).parent}/*.jsonl", streaming=True, validation_split_percentage=67
    )
    assert texts(validation) == rows[0][:4]
    seen = [text for batch in DataLoader(train.dataset, num_workers=num_workers) for text in batch["text"]]
    assert sorted(seen) == [text for file in rows for text in file][4:]


def test_given_validation_data_leaves_the_training_data_whole(write, load):
    train, validation = load(
        do_eval=True, train_file=write("a.jsonl", ["a", "b"]), validation_file=write("b.jsonl", ["c"])
    )
    assert (texts(train), texts(validation)) == (["a", "b"], ["c"])
    assert load(do_train=False, do_eval=False, train_file=write("a.jsonl", ["a"])) == (None, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_split_that_leaves_nothing_is_refused(streaming, write, load):
    path = write("a.jsonl", ["only"])
    with pytest.raises(DataError, match=r"a.jsonl' has 1 rows, and holding out 5 percent .* leaves none to train on"):
        load(do_eval=True, train_file=path, streaming=streaming)
    assert texts(load(do_eval=False, train_file=path, streaming=streaming)[0]) == ["only"]
    with pytest.raises(DataError, match="there is no validation data"):
        load(do_eval=True, train_file=path, validation_split_percentage=0, streaming=streaming)
    with pytest.raises(DataError, match="there is no training data"):
        load(validation_file=path, streaming=streaming)


def test_embedded_corpus_is_the_default(load):
    train, validation = load(do_eval=True)
    assert train.source == validation.source == "the embedded corpus"
    assert len(train.dataset) > 10 * len(validation.dataset) > 0
    assert not set(texts(train)) & set(texts(validation))


@pytest.mark.parametrize("streaming", [False, True])
def test_named_dataset_from_a_folder(streaming, write, load, tmp_path):
    write("named/train.jsonl", ["a", "b"])
    write("named/validation.jsonl", ["c"])
    train, validation = load(do_eval=True, dataset_name=str(tmp_path / "named"), streaming=streaming)
    assert (texts(train), texts(validation)) == (["a", "b"], ["c"])


@pytest.mark.parametrize("streaming", [False, True])
def test_named_dataset_written_by_save_to_disk(streaming, load, tmp_path):
    tokens = Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).with_format("torch")
    DatasetDict({"train": tokens, "validation": tokens.select([1])}).save_to_disk(tmp_path / "both")
    train, validation = load(do_eval=True, dataset_name=str(tmp_path / "both"), streaming=streaming)
    assert [list(train.dataset), list(validation.dataset)] == [[{"text": "a", "n": 1}, {"text": "b", "n": 2}]] * 1 + [
        [{"text": "b", "n": 2}]
    ]
    assert type(next(iter(train.dataset))["n"]) is int
    tokens.save_to_disk(tmp_path / "one")
    train, validation = load(
        do_eval=True, dataset_name=str(tmp_path / "one"), validation_split_percentage=50, streaming=streaming
    )
    assert (texts(train), texts(validation)) == (["b"], ["a"])


def test_named_dataset_that_is_not_there(write, load, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset_name 'nobody/nothing' cannot be (reached|loaded)"):
        load(dataset_name="nobody/nothing")
    (tmp_path / "no_data").mkdir()
    with pytest.raises(DataError, match=r"no_data' cannot be loaded: .* any data files"):
        load(dataset_name=str(tmp_path / "no_data"))
    write("test_only/test.jsonl", ["a"])
    with pytest.raises(DataError, match="has no split 'train' or 'validation', only: test"):
        load(dataset_name=str(tmp_path / "test_only"))


def test_full_disk_is_not_blamed_on_the_data(write, load, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "from_json", fail)
    with pytest.raises(OSError, match="No space left"):
        load(train_file=write("a.jsonl", ["a"]))


@pytest.mark.parametrize("flags", [{"streaming_shuffle_buffer": 5}, {"streaming_partitions": 2}])
def test_flags_of_streams_are_refused_without_one(flags, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (name,) = flags
    with pytest.raises(DataError, match=f"{name}={flags[name]} has no effect without streaming"):
        check_data_arguments(DataArguments(train_file=str(tmp_path / "a.jsonl"), **flags))
