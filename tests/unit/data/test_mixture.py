"""Several sources with weights: what the file may say, and how often each source is drawn."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
from streams import BLOCK_SIZE, EOS, VOCAB_SIZE, number_of, source_of, stream_of, tokenizer, write_files

from moe_hf.data.arguments import DataArguments, check_data_arguments
from moe_hf.data.build import build_datasets
from moe_hf.data.mixture_file import sources_of
from moe_hf.errors import DataError


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Globs of three sources of 300, 60 and 40 documents, numbered from 0, 1000 and 2000."""
    counts = {"a": [100] * 3, "b": [60], "c": [20, 20]}
    return [write_files(tmp_path / name, counts[name], 1000 * i) for i, name in enumerate(counts)]


def write(tmp_path: Path, entries: object) -> str:
    path = tmp_path / "mixture.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def build(tmp_path: Path, entries: list[dict], do_eval: bool = False, **flags):
    values = {"packing": "pad", "validation_split_percentage": 0, "cache_dir": str(tmp_path / "cache")} | flags
    data_args = DataArguments(dataset_mixture=write(tmp_path, entries), **values)
    sizes = {"block_size": BLOCK_SIZE, "vocab_size": VOCAB_SIZE}
    return build_datasets(data_args, tokenizer(tmp_path / "tokenizer"), do_train=True, do_eval=do_eval, **sizes)


def check_shares(drawn: list[int], weights: list[float]) -> None:
    """Each source's share is within four standard deviations of its probability."""
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        count = sum(number // 1000 == index for number in drawn)
        deviation = math.sqrt(len(drawn) * share * (1 - share))
        assert abs(count - len(drawn) * share) < 4 * deviation, (index, count)


def test_file_names_sources_as_flags_do(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "- dataset_name: HuggingFaceFW/fineweb-edu\n"
        "  dataset_config_name: sample-10BT\n"
        "  weight: 7e-1\n"
        "- {train_file: code/*.jsonl, text_column: content, weight: 1}\n"
        "- {dataset_name: other, split: extra, weight: 2.5}\n"
    )
    data_args = DataArguments(dataset_mixture=str(path), text_column="body", block_size=64, validation_file="v.jsonl")
    first, second, third = sources_of(data_args)
    assert [source.weight for source in (first, second, third)] == [0.7, 1.0, 2.5]
    assert (first.data_args.dataset_name, first.data_args.dataset_config_name) == (
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
    )
    assert (second.data_args.train_file, second.data_args.text_column) == ("code/*.jsonl", "content")
    assert (third.data_args.text_column, third.split, first.split) == ("body", "extra", "train")
    assert {source.data_args.block_size for source in (first, second, third)} == {64}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("- {weight: [", "is not valid"),
        ("{}", "must hold a list of sources"),
        ([], "must hold a list of sources"),
        (["a.jsonl"], "source 1 of {} is 'a.jsonl'; give a train_file or a dataset_name, and a weight"),
        ([{"train_file": "{a}", "wieght": 1}], "source 1 of {} has the unknown key 'wieght'; did you mean 'weight'?"),
        ([{"train_file": "{a}", "zzz": 1}], "unknown key 'zzz'; use train_file, dataset_name"),
        ([{"weight": 1}], "source 1 of {} needs either a train_file or a dataset_name"),
        ([{"train_file": "{a}", "dataset_name": "b", "weight": 1}], "needs either a train_file or a dataset_name"),
        ([{"train_file": "{a}", "weight": 1}, {"train_file": "{a}"}], "source 2 of {}: weight=None must be a number"),
        ([{"train_file": "{a}", "weight": 0}], "weight=0 must be a number above 0"),
        ([{"train_file": "{a}", "weight": -0.5}], "weight=-0.5 must be a number above 0"),
        ([{"train_file": "{a}", "weight": "much"}], "weight='much' must be a number above 0"),
        ([{"train_file": "{a}", "weight": math.nan}], "weight=nan must be a number above 0"),
        ([{"train_file": "{a}", "weight": True}], "weight=True must be a number above 0"),
        ([{"train_file": 3, "weight": 1}], "train_file=3 must be a text"),
        ([{"train_file": "{a}", "weight": 1, "split": "x"}], "split='x' has no effect on a train_file"),
        ([{"train_file": "/none.jsonl", "weight": 1}], "train_file '/none.jsonl' does not exist"),
        ([{"dataset_name": "/none", "weight": 1}], "dataset_name '/none' does not exist"),
        ([{"train_file": "{text}", "weight": 1}], "holds lines of text, and a mixture draws documents"),
    ],
)
def test_mistakes_in_the_file_are_one_sentence(entries, message, sources, tmp_path):
    (tmp_path / "lines.txt").write_text("x\n")
    written = entries if isinstance(entries, str) else json.dumps(entries)
    path = write(tmp_path, written.replace("{a}", sources[0]).replace("{text}", str(tmp_path / "lines.txt")))
    with pytest.raises(DataError) as error:
        check_data_arguments(DataArguments(dataset_mixture=path))
    assert message.replace("{}", repr(path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_that_contradict_a_mixture(sources, tmp_path):
    path = write(tmp_path, [{"train_file": sources[0], "weight": 1}])
    check_data_arguments(DataArguments(dataset_mixture=path))
    for flag, value in {"train_file": sources[0], "dataset_name": "x"}.items():
        with pytest.raises(DataError, match=f"dataset_mixture=.* and {flag}=.* both given"):
            check_data_arguments(DataArguments(dataset_mixture=path, **{flag: value}))
    with pytest.raises(DataError, match=r"dataset_mixture '/none.yaml' cannot be read: No such file"):
        check_data_arguments(DataArguments(dataset_mixture="/none.yaml"))


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1, 1, 6]])
def test_stream_draws_documents_by_weight(weights, sources, tmp_path):
    entries = [{"train_file": source, "weight": w} for source, w in zip(sources, weights, strict=True)]
    train, _ = build(tmp_path, entries, streaming=True, streaming_shuffle_buffer=50)
    drawn = [number_of(row["input_ids"]) for row in islice(train, 3000)]
    check_shares(drawn, weights)
    for index, size in enumerate((300, 60, 40)):
        own = [number % 1000 for number in drawn if number // 1000 == index]
        # Each source by itself is read in whole epochs, one after the other.
        for first in range(0, len(own) - size + 1, size):
            assert sorted(own[first : first + size]) == list(range(size))


def test_stored_mixture_holds_every_document_and_its_shares(sources, tmp_path):
    weights = [0.5, 0.3, 0.2]
    entries = [{"train_file": source, "weight": w} for source, w in zip(sources, weights, strict=True)]
    train, _ = build(tmp_path, entries)
    drawn = [number_of(row["input_ids"]) for row in train]
    assert set(drawn) == {*range(300), *range(1000, 1060), *range(2000, 2040)}
    check_shares(drawn, weights)
    again, _ = build(tmp_path, entries)
    assert [number_of(row["input_ids"]) for row in again] == drawn


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_rows_come_from_every_source_once(streaming, sources, tmp_path):
    entries = [{"train_file": source, "weight": 1 + i} for i, source in enumerate(sources)]
    train, validation = build(tmp_path, entries, do_eval=True, validation_split_percentage=10, streaming=streaming)
    held_out = [number_of(row["input_ids"]) for row in validation]
    first_file = 10 if streaming else 30  # of a stream it is a part of the first file
    assert held_out == [*range(first_file), *range(1000, 1006), *range(2000, 2002 if streaming else 2004)]
    assert not set(held_out) & {number_of(row["input_ids"]) for row in islice(train, 1500)}
    limited = {"do_eval": True, "validation_split_percentage": 10, "streaming": streaming, "max_eval_samples": 5}
    _, validation = build(tmp_path, entries, **limited)
    assert [number_of(row["input_ids"]) for row in validation] == [0, 1, 1000, 1001, 2000]
    own = write_files(tmp_path / "own", [5], first=3000)
    train, validation = build(
        tmp_path, entries, do_eval=True, validation_split_percentage=10, validation_file=own, streaming=streaming
    )
    assert [number_of(row["input_ids"]) for row in validation] == [*range(3000, 3005)]
    assert set(held_out) <= {number_of(row["input_ids"]) for row in islice(train, 2500)}


def test_each_source_has_its_text_column(tmp_path):
    for name, column in {"a": "text", "b": "body"}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({column: "w30", "title": "w99"}) + "\n")
    entries = [
        {"train_file": str(tmp_path / "a.jsonl"), "weight": 1},
        {"train_file": str(tmp_path / "b.jsonl"), "weight": 1, "text_column": "body"},
    ]
    for streaming in (False, True):
        train, _ = build(tmp_path, entries, streaming=streaming)
        assert {tuple(map(int, row["input_ids"][:3])) for row in islice(train, 4)} == {(30, EOS, 0)}


def test_text_and_token_ids_do_not_mix(sources, tmp_path):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [30, 31]}) + "\n")
    entries = [{"train_file": path, "weight": 1} for path in (sources[0], str(tmp_path / "ids.jsonl"))]
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"holds input_ids and the training data .* holds text; mix sources of one"):
            build(tmp_path, entries, streaming=streaming)


def test_token_ids_with_and_without_labels_do_not_mix(tmp_path):
    plain, labelled = {"input_ids": [30, 31]}, {"input_ids": [30, 31], "labels": [-100, 31]}
    for name, row in {"plain": plain, "labelled": labelled}.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
    entries = [{"train_file": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("plain", "labelled")]
    for streaming in (False, True):
        with pytest.raises(
            DataError, match=r"has the columns input_ids and .* input_ids, labels; mix sources with the"
        ):
            build(tmp_path, entries, streaming=streaming)


def test_draws_differ_between_parts(sources, tmp_path):
    opened = [source_of(tmp_path, source) for source in sources]
    stream = stream_of(tmp_path, opened, seed=1)
    stream.set_layout(2, 0, 1)
    rows = [number_of(row["input_ids"]) // 1000 for row in islice(stream, 60)]
    assert rows[::2] != rows[1::2]
