"""The documents of one part of a stream, in an order that can be left and found again.

A stream is divided into parts, of which each document belongs to exactly one. Documents are shuffled in chunks: a chunk
is read, shuffled, handed out whole, and only then the next one is read. So a place in the stream is the place in the
file at which a chunk begins and how much of the chunk is gone: a few numbers, and finding it again reads one chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from ..errors import DataError
from .files import RawSplit, reading

Encoder = Callable[[list[dict], list[int]], list]
"""From raw rows and their numbers, counted from 0, to as many documents, fewer where some are empty."""

# Documents that are tokenized at once, and again where a run goes on in their midst.
_SLICE = 32
# Documents in a chunk that is not shuffled.
_UNSHUFFLED_CHUNK = 250
# Lines of a text file that stay together.
_LINES_PER_PIECE = 100


@dataclass(frozen=True)
class StreamSource:
    """One source of a stream: where its rows are, and how they become documents."""

    split: RawSplit
    encode: Encoder
    weight: float = 1.0
    has_pieces: bool = False
    """Rows are lines that belong together: neighbours are handed out in one piece."""


@dataclass
class _Place:
    """Where a chunk begins, and how much of it is gone."""

    epoch: int = 0
    chunk: int = 0
    file: int = 0
    """Position in the epoch's order of files."""
    inside: dict | None = None
    """What `IterableDataset.state_dict` says of the place in the file; `None` is its beginning."""
    row: int = 0
    """Rows or pieces of this part that come before in the file."""
    encoded: int = 0
    """Rows of the shuffled chunk that came before the slice that is being handed out."""
    taken: int = 0
    """Documents of that slice that are gone."""


class DocumentReader:
    """Hand out the documents of one part of one source, epoch after epoch.

    As many files as can be are dealt out whole, each to one part; what then is left is read by all parts, each of which
    keeps every `num_parts`-th row. Each epoch has another order of files and chunks.

    Args:
        source (`StreamSource`): what to read.
        part (`int`): which part, from 0 to `num_parts - 1`.
        num_parts (`int`): how many there are.
        seed (sequence of `int`): of the order; the same for all parts.
        shuffle_buffer (`int`): documents in a chunk; 0 keeps the order of the files.
        num_epochs (`int`, *optional*): end after so many; default: never.
    """

    def __init__(
        self,
        source: StreamSource,
        part: int = 0,
        num_parts: int = 1,
        *,
        seed: tuple[int, ...] = (0,),
        shuffle_buffer: int = 0,
        num_epochs: int | None = None,
    ) -> None:
        self._source, self._part, self._num_parts = source, part, num_parts
        self._seed, self._shuffle_buffer, self._num_epochs = seed, shuffle_buffer, num_epochs
        self._place = _Place()

    @property
    def epoch(self) -> int:
        """How many times every document of this part has been handed out."""
        return self._place.epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the document handed out last; JSON can hold it."""
        return dict(vars(self._place))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where `state` was taken."""
        self._place = _Place(**state)

    def __iter__(self) -> Iterator:
        """Yield what the source's encoder makes of each document.

        Raises:
            DataError: A row is unfit, a file cannot be read, or this part has no documents.
        """
        is_empty = self._place == _Place(epoch=self._place.epoch)
        while self._num_epochs is None or self._place.epoch < self._num_epochs:
            for document in self._rest_of_epoch():
                is_empty = False
                yield document
            if is_empty:
                raise DataError(self._nothing())
            is_empty = True
            self._place = _Place(epoch=self._place.epoch + 1)

    def _rest_of_epoch(self) -> Iterator:
        for chunk in self._chunks():
            place = self._place
            order = np.arange(len(chunk))
            if self._shuffle_buffer:
                order = self._random(1 + self._part, place.epoch, place.chunk).permutation(len(chunk))
            for start in range(place.encoded, len(chunk), _SLICE):
                picked = [chunk[i] for i in order[start : start + _SLICE]]
                documents = self._source.encode([row for row, _ in picked], [number for _, number in picked])
                place.encoded = start
                for document in islice(documents, place.taken, None):
                    place.taken += 1
                    yield document
                place.taken = 0

    def _chunks(self) -> Iterator[list[tuple[dict, int]]]:
        """Yield lists of rows with their numbers; meanwhile the place is where the list begins."""
        size = self._shuffle_buffer or _UNSHUFFLED_CHUNK
        place, chunk = self._place, []
        for position, index, divided in self._files(place.epoch):
            if position < place.file:
                continue
            file = self._open(index, divided)
            is_begun = position == place.file and place.inside is not None
            row = place.row if is_begun else 0
            if is_begun:
                file.load_state_dict(place.inside)
            with reading(self._source.split.where, self._source.split.files):
                for batch in file.iter(batch_size=1):
                    number = self._number(row, index, divided)
                    chunk.append(({name: values[0] for name, values in batch.items()}, number))
                    row += 1
                    if len(chunk) == size:
                        after = _Place(place.epoch, place.chunk + 1, position, file.state_dict(), row)
                        yield chunk
                        self._place, place, chunk = after, after, []
        if chunk:
            yield chunk

    def _files(self, epoch: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (position, file, whether it is divided) of the files that this part reads in an epoch."""
        num_files = self._source.split.stream.num_shards
        order = self._random(0, epoch).permutation(num_files) if self._shuffle_buffer else range(num_files)
        num_whole = num_files - num_files % self._num_parts
        for position, index in enumerate(order):
            if position >= num_whole or position % self._num_parts == self._part:
                yield position, int(index), position >= num_whole

    def _open(self, index: int, divided: bool) -> IterableDataset:
        split = self._source.split
        file = split.stream.shard(num_shards=split.stream.num_shards, index=index)
        if index == 0 and split.first_row:
            file = file.skip(split.first_row)
        if self._source.has_pieces:
            file = file.batch(_LINES_PER_PIECE)
        return split_dataset_by_node(file, self._part, self._num_parts) if divided else file

    def _number(self, row: int, index: int, divided: bool) -> int:
        """Return how many rows come before the `row`-th of this part in its file, but those that are held out."""
        number = row * self._num_parts + self._part if divided else row
        number *= _LINES_PER_PIECE if self._source.has_pieces else 1
        return number if index == 0 else number - self._source.split.first_row  # which messages add

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([*self._seed, *numbers])

    def _nothing(self) -> str:
        where = self._source.split.where
        if self._num_parts == 1:
            return f"{where} holds no text; give more text or a smaller block_size"
        return (
            f"part {self._part + 1} of {self._num_parts} of {where} has no document, and each process and each of its "
            "loader workers needs one; give more documents, or use fewer processes and workers"
        )
