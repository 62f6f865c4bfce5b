"""A training set that is read while it is trained on: endless, divided over processes, and found again after a stop.

The stream is divided into parts, as many as processes times loader workers unless told otherwise. Every document
belongs to one part, and each part is packed by itself, so no two processes ever see the same document within an epoch.
A process that has several parts takes its rows from them in turn. What a checkpoint keeps is the place in every part:
a run goes on with exactly the next rows, on any number of processes over which the parts can be dealt out evenly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import ConfigError, DataError
from .documents import DocumentReader, StreamSource
from .files import RawSplit
from .mixture import DocumentMixture
from .packing import RowCutter

_POSITION = "position_in_stream"


@dataclass(frozen=True)
class StreamOptions:
    """What decides about the rows of a stream and their order."""

    seed: int = 42
    shuffle_buffer: int = 0
    num_epochs: int | None = None
    """End after so many; only possible for a stream of one source and one part."""


class _Part:
    """One part of the stream: documents of all sources, cut into rows."""

    def __init__(self, documents: DocumentMixture, cutter: RowCutter, where: str) -> None:
        self._documents, self._cutter, self._where = documents, cutter, where
        self.num_rows = 0
        self._pending: list[np.ndarray] = []
        self._num_cut = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.num_rows,
            "documents": self._documents.state_dict(),
            "pending": list(self._pending),
            "cut": self._num_cut,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_rows, self._num_cut = state["rows"], state["cut"]
        self._pending = [np.asarray(tokens, np.int32) for tokens in state["pending"]]
        self._documents.load_state_dict(state["documents"])

    def __iter__(self) -> Iterator[dict]:
        yield from self._rows()
        for document in self._documents:
            self._pending.append(document)
            yield from self._rows()
            if self.num_rows == 0 and self._documents.epoch > 0:
                raise DataError(self._cutter.too_little(self._pending[:-1], self._where))

    def _rows(self) -> Iterator[dict]:
        """Yield the rows that can be cut from the pending tokens, and keep what is left over for the next."""
        rows, rest = self._cutter.cut(self._pending)
        for index in range(self._num_cut, len(rows)):
            self._num_cut = index + 1
            if self._num_cut == len(rows):
                self._pending, self._num_cut = rest, 0
            self.num_rows += 1
            yield rows[index]


class TokenStream(IterableDataset):
    """Rows of tokens for one process, endlessly; `set_layout` says for which.

    Args:
        sources (sequence of `StreamSource`): where documents come from.
        cutter (`RowCutter`): how they become rows.
        options (`StreamOptions`): order and end.
    """

    def __init__(self, sources: Sequence[StreamSource], cutter: RowCutter, options: StreamOptions) -> None:
        self._sources, self._cutter, self._options = sources, cutter, options
        self._states: dict[int, dict] = {}
        self._live: dict[int, _Part] = {}
        self.num_parts, self._rank, self._world_size, self._first_worker = 1, 0, 1, 0

    @property
    def rank_parts(self) -> list[int]:
        """The parts that this process reads."""
        return list(range(self._rank, self.num_parts, self._world_size))

    @property
    def reader(self) -> tuple[int, int]:
        """Which of the readers this process is, and how many there are."""
        return self._rank, self._world_size

    def set_layout(self, num_parts: int, rank: int, world_size: int) -> None:
        """Divide the stream into `num_parts` and say which process of how many this is.

        Raises:
            ConfigError: Some processes would have more parts than others.
        """
        if num_parts % world_size:
            fitting = [count for count in range(1, num_parts + 1) if num_parts % count == 0]
            raise ConfigError(
                f"the stream is divided into {num_parts} parts (streaming_partitions), which {world_size} processes "
                f"cannot share evenly; use {', '.join(map(str, fitting[:-1]))}{' or ' * (len(fitting) > 1)}"
                f"{fitting[-1]} processes"
            )
        self.num_parts, self._rank, self._world_size = num_parts, rank, world_size

    def describe(self) -> dict[str, Any]:
        """Return what must not change when a run goes on: by name, as JSON holds it."""
        return {
            "seed": self._options.seed,
            "streaming_shuffle_buffer": self._options.shuffle_buffer,
            # Without folders: data may be moved.
            "sources": [_name_of(s.split) for s in self._sources],
            "rows held out": [s.split.first_row for s in self._sources],
        } | self._cutter.describe()

    def check_start(self) -> None:
        """Read the first row of each part of this process.

        Raises:
            DataError: There is none, or something is wrong with it.
        """
        for _ in islice(self, len(self.rank_parts)):
            pass

    def load_states(self, states: dict[int, dict], first_worker: int = 0) -> None:
        """Let the next iteration begin at these places of this process's parts, with this worker's batch."""
        self._states, self._first_worker = states, first_worker

    def current_states(self) -> dict[int, dict]:
        """Return the places of the parts that are being read here, after the row that was yielded last."""
        return {number: part.state_dict() for number, part in self._live.items()}

    def __iter__(self) -> Iterator[dict]:
        """Yield rows as `packing.prepare_splits` describes them.

        Raises:
            DataError: Unfit rows, unreadable files, or a part without documents.
        """
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.rank_parts[(worker + self._first_worker) % num_workers :: num_workers]
        self._live = {number: self._part(number) for number in mine}
        rows = {number: iter(part) for number, part in self._live.items()}
        while rows:
            number = min(rows, key=lambda number: (self._live[number].num_rows, number))
            try:
                yield next(rows[number])
            except StopIteration:
                del rows[number]

    def _part(self, number: int) -> _Part:
        options = self._options
        readers = [
            DocumentReader(
                source,
                number,
                self.num_parts,
                seed=(options.seed, index),
                shuffle_buffer=options.shuffle_buffer,
                num_epochs=options.num_epochs,
            )
            for index, source in enumerate(self._sources)
        ]
        documents = DocumentMixture(
            readers, [source.weight for source in self._sources], (options.seed, len(readers), number)
        )
        where = " and ".join(source.split.where for source in self._sources)
        part = _Part(documents, self._cutter, where)
        if number in self._states:
            part.load_state_dict(self._states[number])
        return part


def _name_of(split: RawSplit) -> str:
    name = PurePath(split.source.strip("'")).name
    return f"{name} ({split.stream.num_shards} files)"


@dataclass
class _Position:
    """Where the parts of one worker stand after a batch; no tensor, so nothing on the way looks into it."""

    states: dict[int, dict]


@dataclass
class _PositionCollator:
    """Collate rows, and send along where they end: with workers, only they know.

    In a worker, `stream` is the one it reads: both came over together.
    """

    collate: Callable[[list[dict]], dict]
    stream: TokenStream

    def __call__(self, rows: list[dict]) -> dict:
        return self.collate(rows) | {_POSITION: _Position(self.stream.current_states())}


class StreamLoader(DataLoaderShard):
    """Batches of a `TokenStream` on the device; knows the place in the stream after the batch it yielded last.

    Nothing else divides the stream: it is not to be prepared by Accelerate.

    Args:
        stream (`TokenStream`): with its layout set.
        collate (callable): from rows to a batch.
        num_workers (`int`): at most; each needs a part.
        **options: of `torch.utils.data.DataLoader`, and the `device`.
    """

    def __init__(self, stream: TokenStream, collate: Callable, batch_size: int, num_workers: int, **options) -> None:
        super().__init__(
            stream,
            batch_size=batch_size,
            collate_fn=_PositionCollator(collate, stream),
            num_workers=min(num_workers, len(stream.rank_parts)),
            # The order is the stream's own: starting workers is not to draw from the run's random numbers.
            generator=torch.Generator(),
            **options,
        )
        self.states: dict[int, dict] = {}

    def load_states(self, states: dict[int, dict]) -> None:
        """Go on behind these places, with the batch of the worker whose turn it is."""
        self.states = dict(states)
        num_batches = sum(state["rows"] for state in states.values()) // self.batch_size
        self.dataset.load_states(states, num_batches % max(1, self.num_workers))

    def __iter__(self) -> Iterator[dict]:
        try:
            for batch in super().__iter__():
                self.states |= batch.pop(_POSITION).states
                yield batch
        except DataError as error:
            # A worker's comes with its traceback: the sentence is the last line.
            raise DataError(str(error).rstrip().splitlines()[-1].split("DataError: ", 1)[-1]) from error
