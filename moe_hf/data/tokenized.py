"""Rows of tokens read from tokenized shards, without a copy of them: in memory are only the borders of the batches.

The shards are Arrow files, which `datasets` maps into memory. A row is cut out of them when it is asked for, and it
is the row that packing the same text gives: documents are joined and cut into blocks in the same batches.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .arguments import DataArguments
from .packing import cut_blocks, documents_per_batch
from .tokenized_folder import TOKENIZER_NAME, FolderRecord, SplitRecord, read_record, tokenizer_fingerprint


class TokenizedDataset(torch.utils.data.Dataset):
    """The rows of one split of a folder that `moe-hf tokenize` has written.

    A row is a dict of `input_ids` and, when it is cut by document, `position_ids` and `labels`: `np.ndarray` of shape
    `(block_size,)` and dtype int64, see `packing.prepare_splits`. Opened files are left out when it is pickled, and
    pages that processes of one machine read are in its memory once.

    Args:
        folder (`str` or `Path`): The folder.
        split (`SplitRecord`): What its record says of the split.
        block_size (`int`): Tokens per row, at least 2.
        vocab_size (`int`): The model's; a damaged file may hold ids outside it.
        by_document (`bool`, defaults to `False`): As with packing "documents".

    Raises:
        DataError: A shard cannot be opened or is not what was written, or there are too few tokens for one row.
    """

    def __init__(
        self, folder: str | Path, split: SplitRecord, *, block_size: int, vocab_size: int, by_document: bool = False
    ) -> None:
        self._source = f"tokenized_data {str(folder)!r}"
        self._block_size, self._vocab_size, self._by_document = block_size, vocab_size, by_document
        self._documents = _open_shards(Path(folder).expanduser(), split)
        self._documents_per_batch = documents_per_batch(split.num_tokens, split.num_documents, block_size)
        tokens = _tokens_of_batches(self._documents, self._documents_per_batch)
        # Row r lies in the last batch b whose self._first_row[b] is at most r.
        self._first_row = np.concatenate([[0], np.cumsum(tokens // block_size)])
        if len(self) == 0:
            raise DataError(
                f"{self._source} holds {split.num_tokens} of the {block_size} tokens that one row needs; give more "
                "text or a smaller block_size"
            )

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch = int(np.searchsorted(self._first_row, index, side="right")) - 1
        begin = (index - int(self._first_row[batch])) * self._block_size
        tokens, lengths = self._read(batch, begin, begin + self._block_size)
        if tokens.size != self._block_size or tokens.max() >= self._vocab_size:
            raise DataError(
                f"{self._source} is damaged: row {index} holds {tokens.size} tokens up to id {tokens.max(initial=0)}, "
                f"where {self._block_size} below {self._vocab_size} must be; copy or tokenize the data again"
            )
        pieces = np.split(tokens, np.cumsum(lengths)[:-1]) if self._by_document else [tokens]
        rows = cut_blocks({"input_ids": pieces}, self._block_size, self._by_document)
        return {name: values[0] for name, values in rows.items()}

    def _read(self, batch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `begin` to `end` of a batch of documents, and how many of them belong to each document."""
        first = batch * self._documents_per_batch
        documents = self._documents[first : first + self._documents_per_batch]["input_ids"]
        ends = np.cumsum(pc.list_value_length(documents).to_numpy())
        touched = slice(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1)
        before = int(ends[touched.start - 1]) if touched.start else 0
        # None of these copies: the file is read where the slice lies.
        tokens = pc.list_flatten(documents[touched]).slice(begin - before, end - begin).to_numpy()
        return tokens, np.diff(np.minimum(ends[touched], end), prepend=begin)


def open_tokenized(
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    vocab_size: int,
    do_train: bool,
    do_eval: bool,
) -> tuple[TokenizedDataset | Subset | None, TokenizedDataset | Subset | None]:
    """Open the training and the validation rows of `--tokenized_data`; the arguments are those of `build_datasets`.

    Raises:
        DataError: The data was made with another tokenizer, is damaged, lacks a wanted split or is too short.
    """
    folder = data_args.tokenized_data
    record = read_record(folder)
    _check_tokenizer(folder, record, tokenizer, vocab_size)
    wanted = {"train": (do_train, data_args.max_train_samples), "validation": (do_eval, data_args.max_eval_samples)}
    opened = []
    for name, (is_wanted, limit) in wanted.items():
        if not is_wanted:
            opened.append(None)
            continue
        if name not in record.splits:
            raise DataError(
                f"tokenized_data {folder!r} has no {name} split; give moe-hf tokenize a validation_file or a "
                "validation_split_percentage above 0"
            )
        rows = TokenizedDataset(
            folder,
            record.splits[name],
            block_size=block_size,
            vocab_size=vocab_size,
            by_document=data_args.packing == "documents",
        )
        opened.append(rows if limit is None or limit >= len(rows) else Subset(rows, range(limit)))
    return tuple(opened)


def _check_tokenizer(folder: str, record: FolderRecord, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if tokenizer_fingerprint(tokenizer) != record.fingerprint:
        own = str(Path(folder, TOKENIZER_NAME))
        raise DataError(
            f"tokenized_data {folder!r} was made with the tokenizer {record.tokenizer!r}, which tokenizes differently "
            f"from {tokenizer.name_or_path!r}; use tokenizer_name={own!r}, or tokenize again"
        )
    if record.vocab_size > vocab_size:
        raise DataError(
            f"tokenized_data {folder!r} has token ids up to {record.vocab_size - 1}, but the model's vocab_size is "
            f"{vocab_size}; use a vocab_size of at least {record.vocab_size}"
        )


def _open_shards(folder: Path, split: SplitRecord) -> Dataset:
    """Map the shards into memory, as one dataset whose slices are Arrow tables."""
    shards = []
    for shard in split.shards:
        path = folder / shard.file
        try:
            opened = Dataset.from_file(str(path))
            lengths_add_up = _num_tokens(opened) == shard.num_tokens and len(opened) == shard.num_documents
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read ({error}); copy or tokenize the data again") from error
        if not lengths_add_up:
            raise DataError(f"{path} does not hold what tokens.json says; copy or tokenize the data again")
        shards.append(opened)
    return concatenate_datasets(shards).with_format("arrow")


def _num_tokens(documents: Dataset) -> int:
    return sum(chunk.offsets[-1].as_py() - chunk.offsets[0].as_py() for chunk in _chunks(documents) if len(chunk))


def _tokens_of_batches(documents: Dataset, documents_per_batch: int) -> np.ndarray:
    """Return the number of tokens of each batch of documents, of which only those at its borders are looked at."""
    ends, num_documents, num_tokens = [], 0, 0
    for chunk in _chunks(documents):
        offsets = chunk.offsets.to_numpy()
        skipped = -(num_documents + 1) % documents_per_batch
        ends.append(num_tokens + offsets[1 + skipped :: documents_per_batch].astype(np.int64) - offsets[0])
        num_documents += len(chunk)
        num_tokens += int(offsets[-1] - offsets[0])
    borders = np.concatenate([[0], *ends, [num_tokens] if num_documents % documents_per_batch else []])
    return np.diff(borders.astype(np.int64))


def _chunks(documents: Dataset) -> list[pa.ListArray]:
    return documents.data.column("input_ids").chunks
