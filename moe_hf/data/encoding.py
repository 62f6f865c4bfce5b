"""From raw rows to documents of token ids, or rows of token ids that came as such to checked ones.

Everything works on batches, so that `datasets` can run it in a `map` over stored data, and a stream on a few rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .arguments import DataArguments
from .collator import IGNORED_LABEL
from .files import RawSplit, resolve_text_column

MODEL_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids")

# `datasets` recognises a function by its name, not by its code: raise this when rows come out differently, or users
# get the cached rows of the old code.
CACHE_VERSION = 1


def encoding_options(
    split: RawSplit, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, vocab_size: int
) -> dict[str, Any]:
    """Return the keyword arguments with which `tokenize_rows` turns batches of a split into token ids.

    Raises:
        DataError: No column with text, or documents that cannot be ended because the tokenizer has no eos token.
    """
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
    return {
        "tokenizer": tokenizer,
        "column": column,
        "is_lines": split.is_lines,
        "are_joined": are_joined,
        "eos_id": eos_id,
        "vocab_size": vocab_size,
        "where": split.where,
        "first_row": split.first_row,
        "version": CACHE_VERSION,
    }


def tokenize_rows(
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
    """Turn a batch of raw rows into token ids; the arguments are those of `encoding_options`."""
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


def encoder_of(
    split: RawSplit, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, *, block_size: int, vocab_size: int
) -> tuple[Callable[[list[dict], list[int]], list], list[str]]:
    """Return the function that turns rows of a stream and their numbers into documents, and the columns it needs."""
    if "input_ids" in split.column_types:
        options = check_options(split, block_size=block_size, vocab_size=vocab_size)
        return partial(_encode_tokens, options=options), model_columns(split)
    options = encoding_options(split, tokenizer, data_args, vocab_size)
    return partial(_encode_text, options=options), [options["column"]]


def _encode_text(rows: list[dict], numbers: list[int], options: dict) -> list[np.ndarray]:
    """Tokenize rows of text, or pieces of several lines each, of which the tokens are then joined."""
    column = options["column"]
    if rows and isinstance(rows[0][column], list):
        pieces = [
            tokenize_rows({column: row[column]}, range(number, number + len(row[column])), **options)["input_ids"]
            for row, number in zip(rows, numbers, strict=True)
        ]
        return [np.concatenate(lines).astype(np.int32) for lines in pieces if lines]
    documents = tokenize_rows({column: [row[column] for row in rows]}, numbers, **options)["input_ids"]
    return [np.asarray(tokens, np.int32) for tokens in documents]


def _encode_tokens(rows: list[dict], numbers: list[int], options: dict) -> list[dict]:
    check_rows({name: [row[name] for row in rows] for name in rows[0]}, numbers, **options)
    return rows


def model_columns(split: RawSplit) -> list[str]:
    """Return the columns of tokenized data that the model takes."""
    return [name for name in MODEL_COLUMNS if name in split.column_types]


def check_options(split: RawSplit, *, block_size: int, vocab_size: int) -> dict[str, Any]:
    """Return the keyword arguments with which `check_rows` checks batches of a split."""
    return {
        "block_size": block_size,
        "vocab_size": vocab_size,
        "where": split.where,
        "first_row": split.first_row,
        "version": CACHE_VERSION,
    }


def check_rows(
    batch: dict[str, list],
    indices: list[int],
    block_size: int,
    vocab_size: int,
    where: str,
    first_row: int,
    version: int,
) -> dict[str, list]:
    """Return a batch of rows of token ids as it is, or refuse it; the arguments are those of `check_options`."""
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
