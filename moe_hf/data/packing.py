"""From untokenized rows to rows of tokens of the model's length.

Two steps, each a batched `map` that `datasets` caches: documents become token ids (in several processes, see
`encoding`), and token ids become rows. The first step does not depend on the block size, so another block size reuses
it. A stream takes the same two steps piece by piece, the second through `RowCutter`. Data that already holds
`input_ids` is checked and otherwise left alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .arguments import DataArguments
from .collator import IGNORED_LABEL
from .encoding import CACHE_VERSION, check_options, check_rows, encoding_options, model_columns, tokenize_rows
from .files import RawSplit, explain_files
from .mixture import mix

# Every batch that is cut into blocks loses the tokens after its last full block: on average half of one in this many.
_BLOCKS_PER_BATCH = 256


def prepare_splits(
    splits: Sequence[RawSplit],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    data_args: Sequence[DataArguments],
    *,
    block_size: int,
    vocab_size: int,
    seed: int = 42,
) -> Dataset:
    """Tokenize and pack the splits of one or more sources.

    Args:
        splits (sequence of `RawSplit`): Rows with text or, all of them, with `input_ids`.
        weights (sequence of `float`): How often each source's documents are drawn, see `mixture.mix`.
        tokenizer (`PreTrainedTokenizerBase`): Not used for rows that hold `input_ids`.
        data_args (sequence of `DataArguments`): Text column of each source; packing, eos, workers and cache of all.
        block_size (`int`): Tokens per row, at least 2.
        vocab_size (`int`): Token ids must lie below it.
        seed (`int`, defaults to 42): Of the draws.

    Returns:
        `Dataset` of rows with `input_ids` of `block_size` tokens and

        - packing "blocks": nothing else; the labels are the tokens themselves;
        - packing "documents": `position_ids` that restart at 0 at each document, and `labels` that are -100 there,
          because the last token of one document must not predict the first of another;
        - packing "pad": `attention_mask` (1 for tokens, 0 for padding) and `labels` (-100 on padding).

        Rows that came with `input_ids` keep their own length and their `attention_mask`, `labels`, `position_ids`.

    Raises:
        DataError: Text that is not text, a token id the model does not have, a row longer than the block size, or
            too little text for a single row.
    """
    if are_tokenized(splits):
        rows = [
            _use_tokens(*each, block_size=block_size, vocab_size=vocab_size)
            for each in zip(splits, data_args, strict=True)
        ]
        return mix(rows, weights, seed)
    documents = [
        _tokenize(split, tokenizer, its_args, vocab_size) for split, its_args in zip(splits, data_args, strict=True)
    ]
    where = " and ".join(split.where for split in splits)
    for split, its_documents in zip(splits, documents, strict=True):
        if not len(its_documents):
            raise DataError(f"{split.where} holds no text; give more text or a smaller block_size")
    mixed = mix(documents, weights, seed)
    cutter = cutter_of(tokenizer, data_args[0], block_size)
    rows = _pack(mixed, cutter, data_args[0])
    if not len(rows):
        raise DataError(cutter.too_little(mixed["input_ids"], where))
    return rows


def are_tokenized(splits: Sequence[RawSplit]) -> bool:
    """Tell whether rows hold token ids already.

    Raises:
        DataError: Those of some splits do, and of others not, or they have unequal columns.
    """
    tokenized = ["input_ids" in split.column_types for split in splits]
    if any(tokenized) and not all(tokenized):
        with_text, with_ids = splits[tokenized.index(False)], splits[tokenized.index(True)]
        raise DataError(f"{with_ids.where} holds input_ids and {with_text.where} holds text; mix sources of one kind")
    if all(tokenized):
        first, *others = [(split.where, model_columns(split)) for split in splits]
        for where, columns in others:
            if columns != first[1]:
                raise DataError(
                    f"{first[0]} has the columns {', '.join(first[1])} and {where} {', '.join(columns)}; mix sources "
                    "with the same columns"
                )
    return all(tokenized)


@dataclass(frozen=True)
class RowCutter:
    """Cuts rows for the model from documents of token ids."""

    packing: str
    """One of `PACKINGS`, or "none" for rows that are used as they are."""
    block_size: int
    pad_id: int = 0

    def describe(self) -> dict[str, Any]:
        """Return by name what decides about the rows."""
        return {"packing": self.packing, "block_size": self.block_size}

    @property
    def function(self) -> partial:
        """The function for a batched `map`, but for its version."""
        if self.packing == "pad":
            return partial(_pad_rows, block_size=self.block_size, pad_id=self.pad_id)
        return partial(cut_blocks, block_size=self.block_size, by_document=self.packing == "documents")

    def cut(self, documents: Sequence) -> tuple[list[dict], list[np.ndarray]]:
        """Return as many rows as the documents give, and the tokens left over, divided as the documents are."""
        if self.packing == "none":
            return list(documents), []
        num_tokens = sum(map(len, documents))
        if not documents or (self.packing != "pad" and num_tokens < self.block_size):
            return [], list(documents)
        columns = self.function(batch={"input_ids": documents}, version=CACHE_VERSION)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rest, num_used = [], num_tokens if self.packing == "pad" else len(rows) * self.block_size
        for tokens in documents:
            if num_used < len(tokens):
                rest.append(tokens[num_used:])
            num_used = max(0, num_used - len(tokens))
        return rows, rest

    def too_little(self, documents: Sequence, where: str) -> str:
        """Say that all documents there are do not make one row."""
        return (
            f"{where} holds {sum(map(len, documents))} of the {self.block_size} tokens that one row needs; give more "
            "text or a smaller block_size"
        )


def cutter_of(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, block_size: int, *, tokenized: bool = False
) -> RowCutter:
    """Return what cuts rows as the flags say; rows that are `tokenized` already stay as they are."""
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return RowCutter("none" if tokenized else data_args.packing, block_size, pad_id)


def _pack(documents: Dataset, cutter: RowCutter, data_args: DataArguments) -> Dataset:
    """Turn documents of token ids into rows for the model."""
    function = cutter.function
    kwargs = {**function.keywords, "version": CACHE_VERSION}
    if cutter.packing == "pad":
        columns = ["input_ids", "attention_mask", "labels"]
        return _map(documents, function.func, ["input_ids"], columns, data_args, fn_kwargs=kwargs)
    columns = ["input_ids", "position_ids", "labels"] if kwargs["by_document"] else ["input_ids"]
    blocks = _map(
        documents.with_format("numpy"),  # spares the detour over lists of Python integers
        function.func,
        ["input_ids"],
        columns,
        data_args,
        batch_size=documents_per_batch(_num_tokens(documents), documents.data.num_rows, cutter.block_size),
        num_proc=None,  # cutting is fast, and the rows then do not depend on the number of processes
        fn_kwargs=kwargs,
    )
    return blocks.with_format(None)


def _tokenize(
    split: RawSplit, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, vocab_size: int
) -> Dataset:
    """Turn each document into one row of token ids; documents without text disappear."""
    kwargs = encoding_options(split, tokenizer, data_args, vocab_size)
    column = kwargs["column"]
    dataset = split.dataset.select_columns([column])
    try:
        return _map(dataset, tokenize_rows, [column], ["input_ids"], data_args, with_indices=True, fn_kwargs=kwargs)
    except UnicodeDecodeError as error:
        # Arrow accepts bytes that are not text, and decodes them only when a row is looked at.
        raise DataError(explain_files(split.files, error) if split.files else f"{split.where}: {error}") from error


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


def cut_blocks(
    batch: dict[str, list], block_size: int, by_document: bool, version: int = CACHE_VERSION
) -> dict[str, np.ndarray]:
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


def _use_tokens(split: RawSplit, data_args: DataArguments, *, block_size: int, vocab_size: int) -> Dataset:
    """Keep the model's columns of tokenized data, after reading each row once."""
    columns = model_columns(split)
    kwargs = check_options(split, block_size=block_size, vocab_size=vocab_size)
    dataset = split.dataset.select_columns(columns)
    return _map(dataset, check_rows, columns, columns, data_args, with_indices=True, fn_kwargs=kwargs)


def _map(
    dataset: Dataset,
    function: Callable[..., dict],
    removed: Sequence[str],
    columns: Sequence[str],
    data_args: DataArguments,
    **options: Any,
) -> Dataset:
    """Run a batched `map` that replaces the columns `removed` by lists of integers."""
    options = {"num_proc": data_args.preprocessing_num_workers} | options
    return dataset.map(
        function,
        batched=True,
        remove_columns=removed,
        features=Features({name: List(Value("int32")) for name in columns}),  # half the cache of 64 bits
        load_from_cache_file=not data_args.overwrite_cache,
        **options,
    )


def documents_per_batch(num_tokens: int, num_documents: int, block_size: int) -> int:
    """Return how many documents to cut into blocks at once, so that what is left over after the last hardly counts.

    A fixed number, the usual way, loses everything when that many short lines do not fill one block.
    """
    return max(1, -(-_BLOCKS_PER_BATCH * block_size * num_documents // max(1, num_tokens)))


def _num_tokens(documents: Dataset) -> int:
    # Arrow knows the total without a pass over the rows.
    return sum(len(chunk.flatten()) for chunk in documents.data.column("input_ids").chunks)
