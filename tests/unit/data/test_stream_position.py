"""The place in a stream in a checkpoint: found again, or refused in one sentence."""

import json
from itertools import islice
from pathlib import Path

import pytest
from streams import plain, source_of, stream_of, write_files

from moe_hf.data.collator import CausalLMCollator
from moe_hf.data.stream_position import has_position, read_position, write_position
from moe_hf.data.streaming import StreamLoader, TokenStream
from moe_hf.errors import CheckpointError, ConfigError


@pytest.fixture
def build(tmp_path):
    def build_stream(
        rank: int = 0, world_size: int = 2, counts=(9, 8, 7, 6), packing="documents", held_out=0, **options
    ):
        pattern, flags = write_files(tmp_path / "files", list(counts)), {"validation_split_percentage": held_out}
        source = source_of(tmp_path, pattern, packing=packing, **flags)
        stream = stream_of(tmp_path, [source], packing, **({"seed": 5, "shuffle_buffer": 4} | options))
        stream.set_layout(4, rank, world_size)
        return stream

    return build_stream


def loader_of(stream: TokenStream) -> StreamLoader:
    return StreamLoader(stream, CausalLMCollator(0), 2, 0)


@pytest.fixture
def checkpoint(build, tmp_path) -> Path:
    """Written by two processes after seven batches of each."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for rank in range(2):
        loader = loader_of(build(rank))
        for _ in islice(loader, 7):
            pass
        write_position(folder, rank, loader.dataset, loader.states)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_place_is_found_again(rank, checkpoint, build):
    whole = [plain(batch) for batch in islice(loader_of(build(rank)), 20)]
    stream = build(rank, counts=(9, 8, 7, 6))
    stream.set_layout(6, rank, 2)  # what the flags say now: the checkpoint knows better
    loader = loader_of(stream)
    loader.load_states(read_position(checkpoint, stream, rank, 2))
    assert [plain(batch) for batch in islice(loader, 13)] == whole[7:]
    assert stream.num_parts == 4


def test_one_process_goes_on_for_two(checkpoint, build):
    stream = build(0, 1)
    assert sorted(read_position(checkpoint, stream, 0, 1)) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"divided into 4 parts .* which 3 processes cannot share evenly"):
        read_position(checkpoint, stream, 0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed=5, and now it is 6"),
        ({"shuffle_buffer": 5}, "streaming_shuffle_buffer=4, and now it is 5"),
        ({"held_out": 20}, r"rows held out=\[0\], and now it is \[1\]"),
        ({"packing": "blocks"}, "packing=documents, and now it is blocks"),
        (
            {"counts": (9, 8, 7)},
            r"sources=\['part\*.jsonl \(4 files\)'\], and now it is .*\(3 files\)",
        ),
    ],
)
def test_other_stream_is_refused(changes, message, checkpoint, build, tmp_path):
    for path in (tmp_path / "files").glob("*"):
        path.unlink()
    with pytest.raises(ConfigError, match=message) as error:
        read_position(checkpoint, build(**changes), 0, 2)
    assert "\n" not in str(error.value)


def test_checkpoint_without_a_place(tmp_path, checkpoint, build):
    assert has_position(checkpoint)
    assert not has_position(tmp_path)
    with pytest.raises(CheckpointError, match="has no place in a stream, because its run did not read one"):
        read_position(tmp_path, build(), 0, 2)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), (json.dumps({"format": 2}), "of another version of moe_hf")]
)
def test_damaged_place(content, message, checkpoint, build):
    (checkpoint / "data_state_1.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_position(checkpoint, build(), 0, 2)
