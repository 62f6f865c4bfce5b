"""Which parts of a stream each process reads, where some of them read the same."""

from types import SimpleNamespace

import pytest

from moe_hf.errors import ConfigError
from moe_hf.training.stream_training import check_streaming, lay_out


class Stream:
    """Remembers how it was divided."""

    def set_layout(self, *layout: int) -> None:
        """Take the number of parts, and which of how many readers this is."""
        self.layout = layout

    def check_start(self) -> None:
        """There is always something to begin with."""


def layouts(world_size: int, num_parts: int | None = None, **readers) -> list[tuple[int, ...]]:
    stream, found = Stream(), []
    for rank in range(world_size):
        args = SimpleNamespace(
            world_size=world_size, process_index=rank, dataloader_num_workers=3, resume_from_checkpoint=None
        )
        lay_out(stream, args, num_parts, **readers)
        found.append(stream.layout)
    return found


def test_every_process_reads_parts_of_its_own():
    assert layouts(2) == [(6, 0, 2), (6, 1, 2)]


def test_ranks_that_share_matrices_read_the_same():
    assert layouts(4, num_readers=2) == [(6, 0, 2), (6, 0, 2), (6, 1, 2), (6, 1, 2)]
    assert layouts(4, num_parts=8, num_readers=1) == [(8, 0, 1)] * 4


def test_parts_are_dealt_out_to_readers():
    namespace = SimpleNamespace(do_train=True, max_steps=5)
    data = SimpleNamespace(streaming=True, streaming_partitions=2)
    check_streaming(namespace, data, num_readers=2)
    with pytest.raises(ConfigError, match="streaming_partitions=2 cannot be dealt out evenly to 4 processes"):
        check_streaming(namespace, data, num_readers=4)
