"""Documents of token ids to Arrow files of a wanted size."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from .tokenized_folder import Shard

# Arrow opens record batches one by one: these are large, so that a thousand million tokens are a few hundred of them.
_TOKENS_PER_RECORD_BATCH = 1 << 22


@dataclass
class ShardWriter:
    """Writes documents into `folder/name/00000.arrow` and so on.

    Attributes:
        folder: of all splits.
        name: of this one.
        dtype: of the token ids.
        shard_tokens: a shard is closed by the `write` that reaches so many tokens.
        shards: what was written; complete when the `with` block has ended.
    """

    folder: Path
    name: str
    dtype: str
    shard_tokens: int
    shards: list[Shard] = field(default_factory=list)

    def __enter__(self) -> "ShardWriter":
        (self.folder / self.name).mkdir()
        self._schema = Features({"input_ids": List(Value(self.dtype))}).arrow_schema
        self._file = self._stream = None
        self._num_documents = self._num_tokens = 0
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending = 0
        return self

    def __exit__(self, error_type: type | None, *_) -> None:
        if error_type is None:
            self._close_shard()
        elif self._file is not None:
            self._file.close()

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after the other, and the number of tokens of each."""
        if not len(lengths):
            return
        self._parts.append((tokens, lengths))
        self._pending += len(tokens)
        is_full = self._num_tokens + self._pending >= self.shard_tokens
        if is_full or self._pending >= _TOKENS_PER_RECORD_BATCH:
            self._write_record_batch()
        if is_full:
            self._close_shard()

    def _write_record_batch(self) -> None:
        tokens, lengths = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        self._parts, self._pending = [], 0
        if self._file is None:
            self._path = self.folder / self.name / f"{len(self.shards):05d}.arrow"
            self._file = self._path.open("wb")
            self._stream = pa.ipc.new_stream(self._file, self._schema)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        documents = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        self._stream.write_batch(pa.record_batch([documents], schema=self._schema))
        self._num_documents += len(lengths)
        self._num_tokens += len(tokens)

    def _close_shard(self) -> None:
        if self._parts:
            self._write_record_batch()
        if self._file is None:
            return
        self._stream.close()
        self._file.close()
        file, size = self._path.relative_to(self.folder).as_posix(), self._path.stat().st_size
        self.shards.append(Shard(file, size, self._num_documents, self._num_tokens))
        self._file, self._num_documents, self._num_tokens = None, 0, 0
