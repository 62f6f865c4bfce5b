"""From data flags to the datasets that the Trainer reads."""

import inspect
from contextlib import AbstractContextManager, nullcontext

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .data_arguments import DataArguments, check_data_arguments
from .data_files import load_raw_splits
from .packing import prepare_split

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
) -> tuple[Dataset | IterableDataset | None, Dataset | IterableDataset | None]:
    """Load, tokenize and pack the training and the validation data.

    Args:
        data_args (`DataArguments`): Where the data is and how it is packed.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model.
        block_size (`int`): Tokens per row, from `resolve_block_size`.
        vocab_size (`int`): The model's; a token id outside it is refused.
        do_train (`bool`): Whether training data is wanted.
        do_eval (`bool`): Whether validation data is wanted.
        seed (`int`, defaults to 42): Order of a streamed training set; others are shuffled by the Trainer.
        is_main_process_first_context (context manager, *optional*): Such as `training_args.main_process_first()`:
            one process prepares the data, the others then find it in the cache.

    Returns:
        `tuple`: Training and validation rows, see `packing.prepare_split`; None for what is not wanted.

    Raises:
        DataError: Any mistake in the data or its flags.
    """
    check_data_arguments(data_args)
    with is_main_process_first_context or nullcontext():
        prepared = [
            split and prepare_split(split, tokenizer, data_args, block_size=block_size, vocab_size=vocab_size)
            for split in load_raw_splits(data_args, do_train=do_train, do_eval=do_eval)
        ]
    train = _at_most(prepared[0], data_args.max_train_samples)
    validation = _at_most(prepared[1], data_args.max_eval_samples)
    if isinstance(train, IterableDataset) and data_args.streaming_shuffle_buffer:
        train = _shuffled(train, seed, data_args.streaming_shuffle_buffer)
    return train, validation


def _shuffled(stream: IterableDataset, seed: int, buffer_size: int) -> IterableDataset:
    options = {}
    # Newer versions fill the buffer from ten files at once. Each would then be packed alone, and small files, which
    # only together fill a block, would give no rows at all.
    if "max_buffer_input_shards" in inspect.signature(stream.shuffle).parameters:
        options["max_buffer_input_shards"] = 1
    return stream.shuffle(seed=seed, buffer_size=buffer_size, **options)


def _at_most(dataset: Dataset | IterableDataset | None, num_rows: int | None) -> Dataset | IterableDataset | None:
    if dataset is None or num_rows is None:
        return dataset
    return dataset.take(num_rows if isinstance(dataset, IterableDataset) else min(num_rows, len(dataset)))
