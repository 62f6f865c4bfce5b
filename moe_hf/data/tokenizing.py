"""Text to tokenized shards: once, ahead of training, for data that is too much to prepare at the start of each run.

Raw rows are read and tokenized by the same functions as for training. They pass through in batches, of which only a
few are in memory, and come out as Arrow files, which `datasets` and many other programs read.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import chain
from multiprocessing import forkserver, get_context
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..checkpoint.folders import new_folder
from ..errors import ConfigError, DataError
from .arguments import DataArguments, check_data_arguments
from .encoding import encoding_options, tokenize_rows
from .files import RawSplit, explained, load_raw_splits, reading
from .shard_writer import ShardWriter
from .tokenized_folder import (
    RECORD_NAME,
    TOKENIZER_NAME,
    FolderRecord,
    SplitRecord,
    tokenizer_fingerprint,
    write_record,
)

_ROWS_PER_TASK = 128


def tokenize_to_folder(
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    destination: str | Path,
    *,
    shard_tokens: int,
    num_proc: int = 1,
    overwrite: bool = False,
    show_progress: bool = False,
) -> FolderRecord:
    """Tokenize the training and the validation data into a folder for `--tokenized_data`.

    Args:
        data_args (`DataArguments`): Where the text is; what is said of rows has no effect.
        tokenizer (`PreTrainedTokenizerBase`): Is saved beside the tokens.
        destination (`str` or `Path`): The folder; it appears when everything is on the disk, by one rename.
        shard_tokens (`int`): A shard is closed with the batch of documents that reaches so many tokens.
        num_proc (`int`, defaults to 1): Processes that tokenize; the tokens and their order do not depend on it.
        overwrite (`bool`, defaults to `False`): Replace the tokenized data that is there.
        show_progress (`bool`, defaults to `False`): Draw a bar on stderr.

    Returns:
        `FolderRecord`: What was written.

    Raises:
        ConfigError: The destination is there already, or not one that may be overwritten.
        DataError: Any mistake in the data or its flags, or a process that was killed.
    """
    check_data_arguments(data_args)
    check_destination(destination, overwrite)
    destination = Path(destination).expanduser()
    has_validation = data_args.validation_split_percentage > 0 or data_args.validation_file is not None
    raw_splits = load_raw_splits(data_args, do_train=True, do_eval=has_validation)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    splits = {}
    with new_folder(destination, replace=overwrite) as folder:
        tokenizer.save_pretrained(folder / TOKENIZER_NAME)
        for name, split in zip(("train", "validation"), raw_splits, strict=True):
            if split is None:
                continue
            if "input_ids" in split.column_types:
                raise DataError(f"{split.source} holds input_ids already; train on it as it is, without tokenizing it")
            options = encoding_options(split, tokenizer, data_args, vocab_size)
            encode = partial(_encode, options=options, dtype=dtype)
            reader = closing(_read(split, options["column"], show_progress))
            with ShardWriter(folder, name, dtype, shard_tokens) as writer, reader as batches:
                for encoded in _in_order(encode, batches, num_proc):
                    writer.write(*encoded)
            if not writer.shards:
                raise DataError(f"{split.where} holds no text; give data that does")
            splits[name] = SplitRecord(split.source, split.is_lines, tuple(writer.shards))
        record = FolderRecord(
            tokenizer=tokenizer.name_or_path,
            fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=vocab_size,
            eos_token_id=tokenizer.eos_token_id if data_args.append_eos else None,
            dtype=dtype,
            splits=splits,
        )
        write_record(folder, record)
    return record


def check_destination(destination: str | Path, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it may be overwritten and moe-hf tokenize has written it.

    Raises:
        ConfigError: It would have to be overwritten.
    """
    destination = Path(destination).expanduser()
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / RECORD_NAME).is_file():
        raise ConfigError(f"--output_dir {destination} is there and holds something else; give a new folder.")
    if not overwrite:
        raise ConfigError(f"--output_dir {destination} is already there; give a new folder, or add --overwrite.")


def _read(split: RawSplit, column: str, show_progress: bool) -> Iterator[tuple[int, dict[str, list]]]:
    """Yield batches of the rows of one column, each with the number of its first row."""
    first = 0
    rows = split.dataset.select_columns([column])
    bar = tqdm(
        total=len(rows) if isinstance(rows, Dataset) else None,
        desc=f"tokenizing {split.name} data",
        unit=" rows",
        disable=not show_progress,
    )
    with bar, explained(split.files), reading(split.where, split.files):
        for batch in rows.iter(batch_size=_ROWS_PER_TASK):
            yield first, batch
            first += len(next(iter(batch.values())))
            bar.update(first - bar.n)


def _encode(numbered: tuple[int, dict[str, list]], options: dict, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a batch of documents, one after the other, and the number of tokens of each."""
    first, batch = numbered
    numbers = range(first, first + len(batch[options["column"]]))
    rows = tokenize_rows(batch, numbers, **options)["input_ids"]
    return np.fromiter(chain.from_iterable(rows), dtype), np.array([len(row) for row in rows], np.int64)


def _in_order(function: Callable, items: Iterable, num_proc: int) -> Iterator:
    """Map over `items` in processes, in their order; at most two items a process are waiting or worked on."""
    if num_proc == 1:
        yield from map(function, items)
        return
    # Not forked: this process has threads, of Arrow and of the tokenizer, whose locks a child would inherit.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_forkserver()
    pending = deque()
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(function,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_work, item))
                if len(pending) >= 2 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenizes was killed, perhaps because memory ran out; use a smaller num_proc"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _start_forkserver() -> None:
    """Start the process that all others are forked from; Ctrl-C, which reaches them too, is left to this one."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process a core already


def _work(item: object) -> object:
    return _function(item)
