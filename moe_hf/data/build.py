"""From data flags to the datasets that the Trainer reads."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice

import datasets
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .arguments import DataArguments, check_data_arguments
from .documents import StreamSource
from .encoding import encoder_of
from .files import RawSplit, load_raw_splits
from .mixture_file import MixtureSource, sources_of
from .packing import are_tokenized, cutter_of, prepare_splits
from .streaming import StreamOptions, TokenStream
from .tokenized import open_tokenized

DEFAULT_BLOCK_SIZE = 1024


def resolve_block_size(
    data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int | None
) -> int:
    """Return the number of tokens per row.

    Args:
        data_args (`DataArguments`): Its `block_size` is taken when given.
        tokenizer (`PreTrainedTokenizerBase`): Otherwise its `model_max_length`, at most 1024, is.
        max_position_embeddings (`int`, *optional*): What the model can attend over; None when it has no bound.

    Returns:
        `int`: At most `max_position_embeddings`.

    Raises:
        DataError: The given block size is more than the model's positions.
    """
    limit = max_position_embeddings
    if data_args.block_size is None:
        return min(tokenizer.model_max_length, DEFAULT_BLOCK_SIZE, limit or DEFAULT_BLOCK_SIZE)
    if limit is not None and data_args.block_size > limit:
        raise DataError(
            f"block_size={data_args.block_size} is more than the model's max_position_embeddings={limit}; use at most "
            f"{limit}"
        )
    return data_args.block_size


def build_datasets(
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    vocab_size: int,
    do_train: bool,
    do_eval: bool,
    seed: int = 42,
    is_main_process_first_context: AbstractContextManager | None = None,
) -> tuple[Dataset | TokenStream | None, Dataset | None]:
    """Load, tokenize and pack the training and the validation data.

    Args:
        data_args (`DataArguments`): Where the data is and how it is packed.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model.
        block_size (`int`): Tokens per row, from `resolve_block_size`.
        vocab_size (`int`): The model's; a token id outside it is refused.
        do_train (`bool`): Whether training data is wanted.
        do_eval (`bool`): Whether validation data is wanted.
        seed (`int`, defaults to 42): Order of a streamed training set, and draws from a mixture; sets that are not
            streamed are shuffled by the Trainer.
        is_main_process_first_context (context manager, *optional*): Such as `training_args.main_process_first()`:
            one process prepares the data, the others then find it in the cache.

    Returns:
        `tuple`: Training and validation rows, see `packing.prepare_splits`; None for what is not wanted. With
        `streaming`, training rows are a `TokenStream`, which has no end; validation rows never are.

    Raises:
        DataError: Any mistake in the data or its flags. What a stream holds beyond its start is not looked at.
    """
    check_data_arguments(data_args)
    if data_args.tokenized_data is not None:
        return open_tokenized(
            data_args, tokenizer, block_size=block_size, vocab_size=vocab_size, do_train=do_train, do_eval=do_eval
        )
    builder = _Builder(data_args, tokenizer, block_size, vocab_size, seed)
    with is_main_process_first_context or nullcontext():
        train, validation = _load(data_args, do_train=do_train, do_eval=do_eval)
        return builder.training_rows(train) if do_train else None, builder.validation_rows(validation)


_Loaded = list[tuple[MixtureSource, RawSplit]]


def _load(data_args: DataArguments, *, do_train: bool, do_eval: bool) -> tuple[_Loaded, _Loaded]:
    """Load the splits to train and to evaluate on of all sources."""
    own_validation = data_args.dataset_mixture is not None and data_args.validation_file is not None
    train, validation = [], []
    for source in sources_of(data_args) if do_train or not own_validation else ():
        its_train, its_validation = load_raw_splits(
            source.data_args, do_train=do_train, do_eval=do_eval and not own_validation, train_split=source.split
        )
        train.append((source, its_train))
        validation.append((source, its_validation))
    if own_validation:
        alone = replace(data_args, dataset_mixture=None)
        validation = [(MixtureSource(alone), load_raw_splits(alone, do_train=False, do_eval=True)[1])]
    return train, validation if do_eval else []


class _Builder:
    """What rows are made with."""

    def __init__(
        self,
        data_args: DataArguments,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self._data_args, self._tokenizer, self._seed = data_args, tokenizer, seed
        self._sizes = {"block_size": block_size, "vocab_size": vocab_size}

    def training_rows(self, loaded: _Loaded) -> Dataset | TokenStream:
        if self._data_args.streaming:
            buffer = self._data_args.streaming_shuffle_buffer
            return self._stream(loaded, StreamOptions(self._seed, buffer))
        rows = self._prepared(loaded)
        limit = self._data_args.max_train_samples
        return rows if limit is None else rows.take(min(limit, len(rows)))

    def validation_rows(self, loaded: _Loaded) -> Dataset | None:
        """Return all validation rows: in memory where they are streamed, and the same for all processes."""
        limit = self._data_args.max_eval_samples
        parts = []
        for one in loaded:
            if isinstance(one[1].dataset, IterableDataset):
                stream = self._stream([one], StreamOptions(num_epochs=1))
                parts.append(Dataset.from_list([_as_lists(row) for row in islice(stream, limit)]))
            else:
                parts.append(self._prepared([one]))
        if not parts:
            return None
        if limit is not None:
            # Of each source as many, as far as it has them.
            shares = [limit // len(parts) + (i < limit % len(parts)) for i in range(len(parts))]
            parts = [rows.take(min(share, len(rows))) for rows, share in zip(parts, shares, strict=True)]
        return datasets.concatenate_datasets(parts)

    def _prepared(self, loaded: _Loaded) -> Dataset:
        return prepare_splits(
            [split for _, split in loaded],
            [source.weight for source, _ in loaded],
            self._tokenizer,
            [source.data_args for source, _ in loaded],
            seed=self._seed,
            **self._sizes,
        )

    def _stream(self, loaded: _Loaded, options: StreamOptions) -> TokenStream:
        tokenized = are_tokenized([split for _, split in loaded])
        cutter = cutter_of(self._tokenizer, self._data_args, self._sizes["block_size"], tokenized=tokenized)
        return TokenStream([self._source(*one) for one in loaded], cutter, options)

    def _source(self, source: MixtureSource, split: RawSplit) -> StreamSource:
        encode, columns = encoder_of(split, self._tokenizer, source.data_args, **self._sizes)
        split = replace(split, stream=split.stream.select_columns(columns))
        # Lines of a text file belong together, where not each of them has its own row.
        has_pieces = split.is_lines and self._data_args.packing != "pad"
        return StreamSource(split, encode, source.weight, has_pieces)


def _as_lists(row: dict[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: [int(value) for value in values] for name, values in row.items()}
