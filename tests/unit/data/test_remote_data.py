"""Data that is not on this machine: datasets by their name, from a hub that fails, and files by their URL."""

import json
import re
import sys
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pytest
from dataset_server import DatasetServer
from datasets import Dataset
from hub_server import connect
from huggingface_hub import HfFileSystem
from streams import BLOCK_SIZE, VOCAB_SIZE, number_of, text_of, tokenizer

from moe_hf.data.arguments import DataArguments, check_data_arguments
from moe_hf.data.build import build_datasets
from moe_hf.data.collator import CausalLMCollator
from moe_hf.data.streaming import StreamLoader
from moe_hf.errors import DataError

FINEWEB, WIKITEXT = "HuggingFaceFW/fineweb-edu", "Salesforce/wikitext"
SAMPLES = {"sample-10BT": 0, "sample-100BT": 1000}


def write_parquet(path: Path, first: int, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [text_of(number) for number in range(first, first + count)]
    # Of more columns than are wanted, as the real ones are.
    Dataset.from_dict({"text": texts, "id": texts, "score": [0.5] * count}).to_parquet(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two datasets in the layout that they have on the hub, with few and small files."""
    root = tmp_path_factory.mktemp("hub")
    fineweb, wikitext = root / FINEWEB, root / WIKITEXT
    configs = ""
    for config, first in SAMPLES.items():
        folder = config.replace("-", "/")
        configs += f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {folder}/*\n"
        for index in range(4):
            write_parquet(fineweb / folder / f"{index:03d}_00000.parquet", first + 30 * index, 30)
    (fineweb / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# FineWeb-Edu\n")
    for split, first, count in (("train", 0, 40), ("validation", 100, 5), ("test", 200, 5)):
        write_parquet(wikitext / "wikitext-103-raw-v1" / f"{split}-00000-of-00001.parquet", first, count)
    (wikitext / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: wikitext-103-raw-v1/{split}-*\n"
            for split in ("train", "validation", "test")
        )
        + "---\n"
    )
    return root


@pytest.fixture
def server(root, tmp_path, monkeypatch):
    with DatasetServer(root) as running:
        connect(monkeypatch, running, tmp_path / "home", token=None)
        for name, value in {
            "HF_ENDPOINT": running.url,
            "HUB_DATASETS_URL": running.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_HUB_OFFLINE": False,
            "STREAMING_READ_RETRY_INTERVAL": 0.01,
            "STREAMING_READ_MAX_RETRIES": 3,
        }.items():
            monkeypatch.setattr(datasets.config, name, value)
        HfFileSystem.clear_instance_cache()
        yield running


@pytest.fixture
def build(tmp_path):
    def build_rows(do_eval: bool = False, **flags):
        values = {"streaming": True, "packing": "pad", "cache_dir": str(tmp_path / "cache")} | flags
        sizes = {"block_size": BLOCK_SIZE, "vocab_size": VOCAB_SIZE}
        data_args = DataArguments(**values)
        return build_datasets(data_args, tokenizer(tmp_path / "tok"), do_train=True, do_eval=do_eval, **sizes)

    return build_rows


def numbers(rows) -> list[int]:
    return [number_of(row["input_ids"]) for row in rows]


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("config", SAMPLES)
def test_configuration_of_a_dataset_is_streamed_by_name(config, is_local, build, server, root):
    name = str(root / FINEWEB) if is_local else FINEWEB
    train, validation = build(do_eval=True, dataset_name=name, dataset_config_name=config)
    first = SAMPLES[config]
    # Five percent of the first file are held out.
    assert numbers(validation) == [first]
    assert sorted(numbers(islice(train, 119))) == list(range(first + 1, first + 120))
    assert bool(server.served) is not is_local


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_with_its_own_validation_split(streaming, build, server):
    flags = {"dataset_name": WIKITEXT, "dataset_config_name": "wikitext-103-raw-v1", "streaming": streaming}
    train, validation = build(do_eval=True, **flags)
    assert sorted(numbers(islice(train, 40))) == list(range(40))
    assert numbers(validation) == list(range(100, 105))
    assert len(build(do_eval=True, max_eval_samples=2, **flags)[1]) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("protocol", ["memory", "http"])
def test_files_by_their_url(protocol, streaming, build, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    lines = [json.dumps({"text": text_of(number)}) + "\n" for number in range(50)]
    files = {"plain/a.jsonl": "".join(lines[:30]).encode(), "plain/b.jsonl": "".join(lines[30:]).encode()}
    for path, content in files.items():
        fsspec.filesystem("memory").pipe(f"/{path}", content)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    with DatasetServer(tmp_path) as web:
        urls = [f"{'memory:/' if protocol == 'memory' else web.url}/{path}" for path in files]
        train, validation = build(True, train_file=" ".join(urls), validation_file=urls[1], streaming=streaming)
        assert sorted(numbers(islice(train, 50))) == list(range(50))
        assert numbers(validation) == list(range(30, 50))
        assert bool(web.served) is (protocol == "http")


def test_only_what_is_trained_on_is_fetched(build, server):
    train, _ = build(dataset_name=FINEWEB, dataset_config_name="sample-10BT", validation_split_percentage=0)
    train.set_layout(4, 2, 4)
    server.served.clear()
    assert len(set(numbers(islice(train, 30)))) == 30
    assert len(server.served) == 1, "each of four processes reads one of four files"


@pytest.mark.parametrize("status", [500, 503, None])
def test_failures_that_pass_are_not_noticed(status, build, server):
    train, _ = build(dataset_name=FINEWEB, dataset_config_name="sample-10BT", validation_split_percentage=0)
    for index in range(4):
        server.fail(f"{FINEWEB}/sample/10BT/{index:03d}_00000.parquet", 2, status)
    assert sorted(numbers(islice(train, 120))) == list(range(120))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failure_that_stays_is_one_sentence(num_workers, build, server):
    train, _ = build(dataset_name=FINEWEB, dataset_config_name="sample-10BT", streaming_shuffle_buffer=0)
    train.check_start()
    server.fail(f"{FINEWEB}/sample/10BT/002_00000.parquet", 1e9, 500)
    with pytest.raises(DataError) as error:
        for _ in islice(StreamLoader(train, CausalLMCollator(0), 4, num_workers), 60):
            pass
    assert re.match(
        r"the training data \('Hugg.*'\) cannot be read \(.*500.*start again, with --resume", str(error.value)
    )
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_one_sentence(build, server):
    with pytest.raises(DataError, match="dataset_name 'nobody/nothing' cannot be") as error:
        build(dataset_name="nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"BuilderConfig 'sample-1BT' not found. Available: \['sample-10BT"):
        build(dataset_name=FINEWEB, dataset_config_name="sample-1BT")
    with pytest.raises(DataError, match=r"no.jsonl' cannot be read \(FileNotFoundError"):
        build(train_file="memory://plain/no.jsonl")


def test_urls_are_only_looked_at_when_they_are_read(monkeypatch):
    check_data_arguments(DataArguments(train_file="memory://x/a.jsonl.parquet?x=1 memory://y/b.parquet"))
    with pytest.raises(DataError, match=r"a.pdf' has an unsupported extension"):
        check_data_arguments(DataArguments(train_file="memory://a.pdf"))
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "https", raising=False)
    with pytest.raises(
        DataError, match=r"'https://host/a.jsonl' cannot be read here: HTTPFileSystem requires .*aiohttp"
    ):
        check_data_arguments(DataArguments(train_file="https://host/a.jsonl"))
