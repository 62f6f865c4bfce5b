"""Rows of a stream: divided over processes and loader workers, in batches, and on from every place."""

import copy
import json
from itertools import islice

import pytest
import torch
from streams import BLOCK_SIZE, number_of, plain, source_of, stream_of, text_of, write_files

from moe_hf.data.collator import CausalLMCollator
from moe_hf.data.streaming import StreamLoader, TokenStream
from moe_hf.errors import ConfigError, DataError

COLLATE = CausalLMCollator(pad_token_id=0)


@pytest.fixture
def build(tmp_path):
    """Return a function that builds a stream of two sources of several files, read by `rank` of `world_size`."""

    def build_stream(num_parts=4, rank=0, world_size=1, packing="pad", counts=(21, 17, 12, 15), **options):
        first = source_of(tmp_path, write_files(tmp_path / "a", list(counts)), 0.7, packing=packing)
        second = source_of(tmp_path, write_files(tmp_path / "b", [4, 5], first=1000), 0.3, packing=packing)
        sources = [first] if options.get("num_epochs") else [first, second]
        stream = stream_of(tmp_path, sources, packing, **({"seed": 5, "shuffle_buffer": 6} | options))
        stream.set_layout(num_parts, rank, world_size)
        return stream

    return build_stream


def loader_of(stream: TokenStream, batch_size: int = 2, num_workers: int = 0) -> StreamLoader:
    return StreamLoader(stream, COLLATE, batch_size, num_workers)


def saved(states: dict) -> dict:
    """Return states as a checkpoint gives them back."""
    return {int(part): s for part, s in json.loads(json.dumps(states, default=lambda t: t.tolist())).items()}


def read(loader: StreamLoader, count: int) -> list[dict]:
    return list(islice(loader, count))


@pytest.mark.parametrize("num_workers", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_document_is_seen_once_by_one_process(world_size, num_workers, build):
    seen = []
    for rank in range(world_size):
        loader = loader_of(build(12, rank, world_size, num_epochs=1), num_workers=num_workers)
        seen.append([number_of(row) for batch in loader for row in batch["input_ids"]])
    assert sorted(sum(seen, [])) == list(range(65))  # noqa: RUF017


@pytest.mark.parametrize("packing", ["blocks", "documents", "pad"])
def test_global_batches_do_not_depend_on_the_number_of_processes(packing, build):
    """With four parts and four rows for each step, one, two and four processes train on the same rows."""

    def steps(world_size: int) -> list[list[str]]:
        loaders = [islice(build(4, rank, world_size, packing), 120 // world_size) for rank in range(world_size)]
        rows = [[plain(row) for row in loader] for loader in loaders]
        size = 4 // world_size
        return [sorted(r for own in rows for r in own[i * size : (i + 1) * size]) for i in range(30)]

    assert steps(1) == steps(2) == steps(4)
    assert len({row for step in steps(1) for row in step}) > 40


@pytest.mark.parametrize("packing", ["blocks", "documents", "pad"])
@pytest.mark.parametrize("num_workers", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_loader_goes_on_with_exactly_the_next_batches(num_workers, packing, build):
    """Through two sources, several epochs and chunks, from places of every kind."""
    few = {"packing": packing, "counts": (9, 7, 6, 8)}
    whole = loader_of(build(**few), num_workers=num_workers)
    batches, states = [], []
    for batch in islice(whole, 50):
        batches.append(plain(batch))
        states.append(copy.deepcopy(whole.states))
    epochs = [source["epoch"] for source in states[-1][0]["documents"]["sources"]]
    assert max(epochs) > 0
    for place in (0, 1, 2, 6, 13, 27, 40) if num_workers == 0 else (0, 7, 26):
        resumed = loader_of(build(**few), num_workers=num_workers)
        resumed.load_states(saved(states[place]))
        assert [plain(batch) for batch in read(resumed, 49 - place)] == batches[place + 1 :], place


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_row_in_the_middle_of_a_long_document_is_followed_by_its_next(packing, tmp_path):
    texts = [" ".join(f"w{30 + (7 * i + j) % 70}" for j in range(10 + 25 * i)) for i in range(6)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def build_stream() -> TokenStream:
        source = source_of(tmp_path, str(tmp_path / "long.jsonl"), packing=packing)
        return stream_of(tmp_path, [source], packing, shuffle_buffer=3, seed=2)

    stream, rows, states = build_stream(), [], []
    for row in islice(stream, 120):
        rows.append(plain(row))
        states.append(saved(stream.current_states()))
    assert max(state[0]["cut"] for state in states) > 5
    for place in range(0, 100, 3):
        resumed = build_stream()
        resumed.load_states(states[place])
        assert [plain(row) for row in islice(resumed, 119 - place)] == rows[place + 1 :], place


@pytest.mark.parametrize("worlds", [(4, 2, 1), (1, 4, 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(worlds, build):
    """Each of three runs reads ten steps of four rows; together they read what one process reads alone."""

    def rows_of(world_size: int, states: dict, steps: int) -> tuple[list, dict]:
        rows, after = [], {}
        for rank in range(world_size):
            loader = loader_of(build(4, rank, world_size, "documents"), 4 // world_size)
            loader.load_states({part: states[part] for part in loader.dataset.rank_parts if part in states})
            rows += [
                plain({k: v[i] for k, v in b.items()}) for b in read(loader, steps) for i in range(len(b["labels"]))
            ]
            after |= loader.states
        return sorted(rows), saved(after)

    states, apart = {}, []
    for world_size in worlds:
        rows, states = rows_of(world_size, states, 10)
        apart += rows
    assert sorted(apart) == rows_of(1, {}, 30)[0]


def test_parts_that_cannot_be_shared_evenly_are_refused(build):
    with pytest.raises(
        ConfigError, match=r"divided into 4 parts .*which 3 processes cannot share.*use 1, 2 or 4 proce"
    ):
        build(4, 0, 3)


def test_more_workers_than_parts_are_not_started(build):
    loader = loader_of(build(4, 1, 2), num_workers=5)
    assert loader.num_workers == 2
    assert len(read(loader, 4)) == 4


def test_reading_draws_nothing_from_the_runs_random_numbers(build):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    read(loader_of(build(), num_workers=2), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unfit_row_far_into_the_stream_is_one_sentence(num_workers, build, tmp_path):
    stream = build()
    path = tmp_path / "a" / "part02.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": None}) + "\n")
    with pytest.raises(DataError) as error:
        read(loader_of(stream, num_workers=num_workers), 200)
    assert str(error.value).startswith("row 13 of the training data")
    assert "\n" not in str(error.value)


def test_start_is_checked_in_every_part_of_a_process(tmp_path):
    stream = stream_of(tmp_path, [source_of(tmp_path, write_files(tmp_path / "few", [3]))])
    stream.set_layout(4, 0, 2)
    stream.check_start()
    stream.set_layout(4, 1, 2)
    with pytest.raises(DataError, match="part 4 of 4 of the training data"):
        stream.check_start()


def test_part_that_is_shorter_than_a_row_is_refused(tmp_path):
    source = source_of(tmp_path, write_files(tmp_path / "short", [1]), packing="blocks")
    with pytest.raises(DataError, match=rf"holds 3 of the {BLOCK_SIZE} tokens that one row needs"):
        next(iter(stream_of(tmp_path, [source], "blocks")))


def test_nothing_is_lost_where_documents_are_cut(build, tmp_path):
    """The tokens of all rows, one after the other, are the documents, whatever is cut where."""
    stream = build(1, packing="blocks", num_epochs=1, shuffle_buffer=0)
    tokens = [int(token) for row in stream for token in row["input_ids"]]
    words = [f"{text_of(number)} w1" for number in range(65)]
    expected = [int(word[1:]) for word in " ".join(words).split()]
    assert tokens == expected[: len(tokens)]
    assert 0 <= len(expected) - len(tokens) < BLOCK_SIZE
