"""From untokenized rows to rows of tokens of the model's length.

Two steps, each a batched `map` that `datasets` caches: documents become token ids (in several processes), and token
ids become rows. The first step does not depend on the block size, so another block size reuses it. The same two
steps run lazily on a stream. Data that already holds `input_ids` is checked and otherwise left alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .collator import IGNORED_LABEL
from .data_arguments import DataArguments
from .data_files import RawSplit, explain_files, resolve_text_column

MODEL_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids")

# Every batch that is cut into blocks loses the tokens after its last full block: on average half of one in this many.
_BLOCKS_PER_BATCH = 256

# Documents of a stream that are tokenized at once. Small, because several places look at a stream's first rows.
_STREAM_BATCH = 250

# `datasets` recognises a function by its name, not by its code: raise this when rows come out differently, or users
# get the cached rows of the old code.
_CACHE_VERSION = 1


def prepare_split(
    split: RawSplit, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, *, block_size: int, vocab_size: int
) -> Dataset | IterableDataset:
    """Tokenize and pack one split.

    Args:
        split (`RawSplit`): Rows with text or with `input_ids`.
        tokenizer (`PreTrainedTokenizerBase`): Not used for rows that hold `input_ids`.
        data_args (`DataArguments`): Packing, eos, text column, workers, cache.
        block_size (`int`): Tokens per row, at least 2.
        vocab_size (`int`): Token ids must lie below it.

    Returns:
        `Dataset` or `IterableDataset` of rows with `input_ids` of `block_size` tokens and

        - packing "blocks": nothing else; the labels are the tokens themselves;
        - packing "documents": `position_ids` that restart at 0 at each document, and `labels` that are -100 there,
          because the last token of one document must not predict the first of another;
        - packing "pad": `attention_mask` (1 for tokens, 0 for padding) and `labels` (-100 on padding).

        Rows that came with `input_ids` keep their own length and their `attention_mask`, `labels`, `position_ids`.

    Raises:
        DataError: Text that is not text, a token id the model does not have, a row longer than the block size, or
            too little text for a single row. Rows of a stream that are read later raise later.
    """
    try:
        if "input_ids" in split.column_types:
            return _use_tokens(split, data_args, block_size=block_size, vocab_size=vocab_size)
        return _use_text(split, tokenizer, data_args, block_size=block_size, vocab_size=vocab_size)
    except UnicodeDecodeError as error:
        # Arrow accepts bytes that are not text, and decodes them only when a row is looked at.
        raise DataError(explain_files(split.files, error) if split.files else f"{_where(split)}: {error}") from error


def _use_text(
    split: RawSplit, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, *, block_size: int, vocab_size: int
) -> Dataset | IterableDataset:
    documents = _tokenize(split, tokenizer, data_args, vocab_size)
    rows = _pack(documents, tokenizer, data_args, block_size)
    if next(iter(rows.take(1)), None) is None:
        num_tokens = _num_tokens(documents)
        amount = f"{num_tokens} of the {block_size} tokens that one row needs" if num_tokens else "no text"
        raise DataError(f"{_where(split)} holds {amount}; give more text or a smaller block_size")
    return rows


def _pack(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    block_size: int,
) -> Dataset | IterableDataset:
    """Turn documents of token ids into rows for the model."""
    kwargs = {"block_size": block_size, "version": _CACHE_VERSION}
    if data_args.packing == "pad":
        kwargs["pad_id"] = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        columns = ["input_ids", "attention_mask", "labels"]
        return _map(documents, _pad_rows, ["input_ids"], columns, data_args, fn_kwargs=kwargs)
    kwargs["by_document"] = data_args.packing == "documents"
    columns = ["input_ids", "position_ids", "labels"] if kwargs["by_document"] else ["input_ids"]
    is_stored = isinstance(documents, Dataset)
    blocks = _map(
        documents.with_format("numpy") if is_stored else documents,  # spares the detour over lists of Python integers
        _cut_blocks,
        ["input_ids"],
        columns,
        data_args,
        batch_size=_rows_per_batch(documents, block_size),
        num_proc=None,  # cutting is fast, and the rows then do not depend on the number of processes
        fn_kwargs=kwargs,
    )
    return blocks.with_format(None) if is_stored else blocks


def _tokenize(
    split: RawSplit, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, vocab_size: int
) -> Dataset | IterableDataset:
    """Turn each document into one row of token ids; documents without text disappear."""
    column = resolve_text_column(split, data_args.text_column)
    # Lines are parts of a text: nothing may come between them. Where each row stands alone, a line is a document.
    are_joined = split.is_lines and data_args.packing != "pad"
    eos_id = None
    if data_args.append_eos and not are_joined:
        eos_id = tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "append_eos=True needs an eos token, and the tokenizer has none; set one or append_eos=False"
            )
    kwargs = {
        "tokenizer": tokenizer,
        "column": column,
        "is_lines": split.is_lines,
        "are_joined": are_joined,
        "eos_id": eos_id,
        "vocab_size": vocab_size,
        "where": _where(split),
        "first_row": split.first_row,
        "version": _CACHE_VERSION,
    }
    dataset = split.dataset.select_columns([column])
    return _map(dataset, _tokenize_rows, [column], ["input_ids"], data_args, with_indices=True, fn_kwargs=kwargs)


def _tokenize_rows(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    is_lines: bool,
    are_joined: bool,
    eos_id: int | None,
    vocab_size: int,
    where: str,
    first_row: int,
    version: int,
) -> dict[str, list[list[int]]]:
    texts, numbers = [], []
    for index, text in zip(indices, batch[column], strict=True):
        number = first_row + index + 1
        if not isinstance(text, str):
            value = "null" if text is None else f"{text!r:.40} ({type(text).__name__})"
            raise DataError(f"row {number} of {where}: column {column!r} holds {value} instead of a string")
        if text if are_joined else text.strip():
            texts.append(text.rstrip("\n") if is_lines and not are_joined else text)
            numbers.append(number)
    if not texts:
        return {"input_ids": []}
    # Tokenizers that begin every text with a bos token must not do so within a text.
    rows = tokenizer(texts, add_special_tokens=not are_joined, return_attention_mask=False, verbose=False)["input_ids"]
    if eos_id is not None:
        rows = [row if row and row[-1] == eos_id else [*row, eos_id] for row in rows]
    for number, row in zip(numbers, rows, strict=True):
        if row and max(row) >= vocab_size:
            raise DataError(
                f"row {number} of {where} has the token id {max(row)}, but the model's vocab_size is {vocab_size}; use "
                f"the model's own tokenizer, or a vocab_size of at least {len(tokenizer)}"
            )
    return {"input_ids": [row for row in rows if row]}


def _pad_rows(batch: dict[str, list], block_size: int, pad_id: int, version: int) -> dict[str, np.ndarray]:
    """Give every row exactly `block_size` tokens, by cutting its end or by padding on the right."""
    input_ids = np.full((len(batch["input_ids"]), block_size), pad_id)
    attention_mask = np.zeros_like(input_ids)
    for i, row in enumerate(batch["input_ids"]):
        num_tokens = min(len(row), block_size)
        input_ids[i, :num_tokens] = row[:num_tokens]
        attention_mask[i, :num_tokens] = 1
    # By the mask and not by the pad token: where that is the eos token too, a document's own eos stays a label.
    labels = np.where(attention_mask == 1, input_ids, IGNORED_LABEL)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _cut_blocks(batch: dict[str, list], block_size: int, by_document: bool, version: int) -> dict[str, np.ndarray]:
    """Join documents and cut them into blocks; the tokens after the last full block are dropped.

    A document that goes on in the next block is a document of its own there: that block cannot see its beginning.
    """
    lengths = np.array([len(row) for row in batch["input_ids"]], dtype=np.int64)
    num_blocks = int(lengths.sum()) // block_size
    num_kept = num_blocks * block_size
    tokens = np.concatenate([np.empty(0, np.int64), *batch["input_ids"]])[:num_kept].astype(np.int64)
    blocks = {"input_ids": tokens}
    if by_document:
        index = np.arange(num_kept)
        document_start = np.repeat(np.cumsum(lengths) - lengths, lengths)[:num_kept]
        positions = index - np.maximum(document_start, index // block_size * block_size)
        blocks |= {"position_ids": positions, "labels": np.where(positions == 0, IGNORED_LABEL, tokens)}
    return {name: values.reshape(num_blocks, block_size) for name, values in blocks.items()}


def _use_tokens(
    split: RawSplit, data_args: DataArguments, *, block_size: int, vocab_size: int
) -> Dataset | IterableDataset:
    """Keep the model's columns of tokenized data, after reading each row once."""
    columns = [name for name in MODEL_COLUMNS if name in split.column_types]
    kwargs = {
        "block_size": block_size,
        "vocab_size": vocab_size,
        "where": _where(split),
        "first_row": split.first_row,
        "version": _CACHE_VERSION,
    }
    dataset = split.dataset.select_columns(columns)
    rows = _map(dataset, _checked_rows, columns, columns, data_args, with_indices=True, fn_kwargs=kwargs)
    next(iter(rows.take(1)))  # a stream is checked as it is read: show a mistake at its start now
    return rows


def _checked_rows(
    batch: dict[str, list],
    indices: list[int],
    block_size: int,
    vocab_size: int,
    where: str,
    first_row: int,
    version: int,
) -> dict[str, list]:
    limits = {"input_ids": vocab_size, "labels": vocab_size, "attention_mask": 2, "position_ids": 2**31}
    for i, index in enumerate(indices):
        row = f"row {first_row + index + 1} of {where}"
        num_tokens = len(batch["input_ids"][i] or ())
        for name, lists in batch.items():
            values = lists[i]
            if not isinstance(values, list) or not values or not all(isinstance(value, int) for value in values):
                raise DataError(f"{row}: {name} must be a list of at least one integer")
            if len(values) != num_tokens:
                raise DataError(f"{row}: {len(values)} {name} for {num_tokens} input_ids; give one for each token")
            ignored = IGNORED_LABEL if name == "labels" else None
            wrong = next((v for v in values if not 0 <= v < limits[name] and v != ignored), None)
            if wrong is not None:
                raise DataError(
                    f"{row}: {name} holds {wrong}, which is not in the model's range of 0 to {limits[name] - 1}"
                )
        if num_tokens > block_size:
            raise DataError(
                f"{row} has {num_tokens} tokens, more than block_size={block_size}; cut it or raise block_size"
            )
    return dict(batch)  # a new object: `map` empties the one it has passed


def _map(
    dataset: Dataset | IterableDataset,
    function: Callable[..., dict],
    removed: Sequence[str],
    columns: Sequence[str],
    data_args: DataArguments,
    **options: Any,
) -> Dataset | IterableDataset:
    """Run a batched `map` that replaces the columns `removed` by lists of integers."""
    options |= {
        "batched": True,
        "remove_columns": removed,  # by name: a stream may not know its columns
        "features": Features({name: List(Value("int32")) for name in columns}),  # half the cache of 64 bits
    }
    if isinstance(dataset, IterableDataset):
        options.pop("num_proc", None)
        return dataset.map(function, **({"batch_size": _STREAM_BATCH} | options))
    options = {"num_proc": data_args.preprocessing_num_workers} | options
    return dataset.map(function, load_from_cache_file=not data_args.overwrite_cache, **options)


def _rows_per_batch(documents: Dataset | IterableDataset, block_size: int) -> int:
    """Choose how many documents to join at once, so that what is left over after the last block hardly counts.

    A fixed number, the usual way, loses everything when that many short lines do not fill one block.
    """
    if isinstance(documents, IterableDataset):
        counts = [len(row["input_ids"]) for row in documents.take(_STREAM_BATCH)]
        num_tokens, num_rows = sum(counts), len(counts)
    else:
        num_tokens, num_rows = _num_tokens(documents), len(documents)
    return max(1, -(-_BLOCKS_PER_BATCH * block_size * num_rows // max(1, num_tokens)))


def _num_tokens(documents: Dataset | IterableDataset) -> int:
    if isinstance(documents, IterableDataset):
        return sum(len(row["input_ids"]) for row in documents)
    # Arrow knows the total without a pass over the rows.
    return sum(len(chunk.flatten()) for chunk in documents.data.column("input_ids").chunks)


def _where(split: RawSplit) -> str:
    return f"the {split.name} data ({split.source})"
