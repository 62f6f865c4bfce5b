"""Raw data: from the user's flags to a training and a validation split of untokenized rows.

Local files, a dataset on the Hub or on disk, or the embedded corpus; `datasets` does the reading. What it raises
for a broken file names neither file nor line, so only when it fails are the files read again to find the place.
"""

import errno
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from ..errors import DataError
from .arguments import DataArguments, builder_of, find_bad_line, is_url, resolve_files
from .corpus import write_corpus

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

STREAM_PROBE_ROWS = 5000
"""A stream has no length: its validation split is a percentage of this many first rows."""


@dataclass(frozen=True)
class RawSplit:
    """Untokenized rows of one split, and what messages and packing need to know about them."""

    name: str
    """`"training"` or `"validation"`."""
    source: str
    """Where the rows come from, in the user's words."""
    dataset: Dataset | IterableDataset
    column_types: dict[str, str]
    """Column name to type; `"string"` for text."""
    is_lines: bool = False
    """Rows are lines of a text file, which belong together, and not documents."""
    files: tuple[str, ...] = ()
    """The local files that the rows are read from."""
    first_row: int = 0
    """Rows of the source that come before this split, so that messages count as the source does."""
    stream: IterableDataset | None = None
    """Of a stream, all files as they are: the first `first_row` rows of the first file are not part of this split."""

    @property
    def where(self) -> str:
        """What messages call these rows."""
        return f"the {self.name} data ({self.source})"


def load_raw_splits(
    data_args: DataArguments, *, do_train: bool, do_eval: bool, train_split: str = "train"
) -> tuple[RawSplit | None, RawSplit | None]:
    """Load the rows to train and to evaluate on.

    Without validation data, the first `validation_split_percentage` percent of the training data are held out;
    of a stream, that percentage of the first 5000 rows of its first file. They are held out whether or not this run
    evaluates, so that a later run that does never meets text it was trained on.

    Args:
        data_args (`DataArguments`): Already accepted by `check_data_arguments`.
        do_train (`bool`): Whether the training split is wanted.
        do_eval (`bool`): Whether the validation split is wanted.
        train_split (`str`, defaults to `"train"`): The split of `dataset_name` to train on.

    Returns:
        `tuple[RawSplit | None, RawSplit | None]`: Training and validation rows; None for what is not wanted.

    Raises:
        DataError: A file or dataset is missing, unreadable or without rows, or a wanted split has no data.
    """
    if not (do_train or do_eval):
        return None, None
    if data_args.dataset_name is not None:
        loaders = _named_loaders(data_args, train_split)
    else:
        loaders = _file_loaders(data_args)
    has_validation = "validation" in loaders
    if "train" not in loaders and (do_train or not has_validation):
        raise DataError("there is no training data: give train_file, or a dataset_name that has a 'train' split")
    train = validation = None
    if do_train or (do_eval and not has_validation):
        train = loaders["train"]()
    if do_eval and has_validation:
        validation = loaders["validation"]()
    if not has_validation:
        with explained(train.files), reading(train.where, train.files):
            train, validation = _hold_out(train, data_args.validation_split_percentage, do_train, do_eval)
    return train if do_train else None, validation if do_eval else None


def resolve_text_column(split: RawSplit, requested: str | None) -> str:
    """Return the column that holds the text: the requested one, `text`, or the only one with strings.

    Raises:
        DataError: The requested column does not exist, or there is no single candidate.
    """
    columns = ", ".join(split.column_types)
    if requested is not None:
        if requested not in split.column_types:
            raise DataError(f"text_column={requested!r} is not in the {split.name} data, which has: {columns}")
        return requested
    if "text" in split.column_types:
        return "text"
    strings = [name for name, kind in split.column_types.items() if kind in ("string", "large_string")]
    if len(strings) != 1:
        raise DataError(f"the {split.name} data has no column 'text'; set text_column to one of its columns: {columns}")
    return strings[0]


def explain_files(files: Sequence[str], cause: BaseException) -> str:
    """Say in one sentence what is wrong with files of which `datasets` only said `cause`."""
    builder = builder_of(files)
    bad_lines = (find_bad_line(file) for file in files if builder != "parquet" and not is_url(file))
    found = next((sentence for sentence in bad_lines if sentence is not None), None)
    if found is not None:
        return found
    # Two ways in which `datasets` says that there was nothing to read.
    if isinstance(cause, SchemaInferenceError) or "corresponds to no data" in str(cause):
        return f"{', '.join(map(repr, files))} has no rows; give data that holds text"
    named = repr(files[0]) if len(files) == 1 else f"one of {len(files)} files ({files[0]!r} is the first)"
    return f"{named} cannot be read as {builder} ({_first_line(cause).rstrip('.')}); correct it or leave it out"


def _file_loaders(data_args: DataArguments) -> dict[str, Callable[[], RawSplit]]:
    """Say how to load each split that files provide; the embedded corpus when there are no files at all."""
    values = {"train": data_args.train_file, "validation": data_args.validation_file}
    if values["train"] is None and values["validation"] is None:
        paths = dict(zip(values, write_corpus(data_args.cache_dir), strict=True))
        sources = {split: ([path], "the embedded corpus") for split, path in paths.items()}
    else:
        sources = {
            split: (resolve_files(value, f"{split}_file"), repr(value))
            for split, value in values.items()
            if value is not None
        }
    return {split: partial(_load_files, split, *source, data_args) for split, source in sources.items()}


def _load_files(split: str, files: list[str], source: str, data_args: DataArguments) -> RawSplit:
    """Read files of one format as one split, and explain what is wrong with them when that fails."""
    builder = builder_of(files)
    # The reader behind `load_dataset`, which itself would ask a server to count the download: without a network, each
    # process waits seconds for that, for files it already has.
    read = getattr(Dataset, f"from_{builder}")
    options = {"keep_linebreaks": data_args.keep_linebreaks} if builder == "text" else {}
    with explained(files), reading(source, files):
        dataset = read(
            # It takes every path for a pattern: unescaped, 'part[1].txt' would read as no rows at all.
            [file if is_url(file) else glob.escape(os.path.abspath(file)) for file in files],
            split=split,
            cache_dir=data_args.cache_dir,
            streaming=data_args.streaming,
            **options,
        )
        column_types = _column_types(dataset)
    raw = _raw_split(split, source, dataset, column_types)
    return replace(raw, is_lines=builder == "text", files=tuple(files))


def _named_loaders(data_args: DataArguments, train_split: str) -> dict[str, Callable[[], RawSplit]]:
    """Load a dataset from the Hub or from a folder and offer its `train` and `validation` splits."""
    name = data_args.dataset_name
    try:
        loaded = _load_named(os.path.expanduser(name), data_args)
    except ConnectionError as error:
        raise DataError(
            f"dataset_name {name!r} cannot be reached ({_first_line(error)}); check the name and the network, or use "
            "train_file for local data"
        ) from error
    except (FileNotFoundError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: dataset scripts
        raise DataError(f"dataset_name {name!r} cannot be loaded: {_first_line(_root_cause(error))}") from error
    except HfHubHTTPError as error:
        raise DataError(f"dataset_name {name!r} cannot be loaded: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    names = {"train": train_split, "validation": "validation"}
    wanted = {split: loaded[its_name] for split, its_name in names.items() if its_name in loaded}
    if not wanted or (train_split not in loaded and train_split != "train"):
        splits = ", ".join(map(str, loaded))
        missing = "'train' or 'validation'" if train_split == "train" else repr(train_split)
        raise DataError(f"dataset_name {name!r} has no split {missing}, only: {splits}")

    def load(split: str) -> RawSplit:
        with reading(repr(name)):
            column_types = _column_types(wanted[split])
        return _raw_split(split, repr(name), wanted[split], column_types)

    return {split: partial(load, split) for split in wanted}


def _load_named(name: str, data_args: DataArguments) -> DatasetDict | IterableDatasetDict | Dataset | IterableDataset:
    if any(os.path.isfile(os.path.join(name, marker)) for marker in ("dataset_dict.json", "state.json")):
        # Saved with tensors as its format, it would hand tensors to every function below. (Not to be done to a stream:
        # in `datasets` 5.2, loader workers read one row per file of a stream that was formatted and concatenated.)
        saved = datasets.load_from_disk(name).with_format(None)
        if not data_args.streaming:
            return saved
        if isinstance(saved, Dataset):
            return saved.to_iterable_dataset()
        return {split: dataset.to_iterable_dataset() for split, dataset in saved.items()}
    return datasets.load_dataset(
        name, data_args.dataset_config_name, cache_dir=data_args.cache_dir, streaming=data_args.streaming
    )


def _raw_split(split: str, source: str, dataset: Dataset | IterableDataset, column_types: dict[str, str]) -> RawSplit:
    if not column_types:
        raise DataError(f"{source} has no rows; give data that holds text")
    stream = dataset if isinstance(dataset, IterableDataset) else None
    return RawSplit("training" if split == "train" else split, source, dataset, column_types, stream=stream)


def _column_types(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """Map columns to types; empty without rows. A stream is opened, so that a file broken at its start shows here."""
    first = next(iter(dataset.take(1)), None)
    if first is None:
        return {}
    if dataset.features is None:
        return {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in first.items()}
    return {name: getattr(feature, "dtype", type(feature).__name__) for name, feature in dataset.features.items()}


def _hold_out(
    split: RawSplit, percentage: int, do_train: bool, do_eval: bool
) -> tuple[RawSplit | None, RawSplit | None]:
    """Divide the training rows into training and validation: the first `percentage` percent are held out."""
    if percentage == 0:
        if do_eval:
            raise DataError("there is no validation data: give validation_file or validation_split_percentage above 0")
        return split, None
    is_stream = isinstance(split.dataset, IterableDataset)
    first_shard, rest = _split_off_first_shard(split.dataset) if is_stream else (split.dataset, [])
    num_rows = sum(1 for _ in first_shard.take(STREAM_PROBE_ROWS)) if is_stream else len(first_shard)
    num_held_out = max(1, num_rows * percentage // 100)
    if do_train and num_held_out == num_rows and not rest:
        if percentage < 100 and not do_eval:
            return split, None
        raise DataError(
            f"{split.source} has {num_rows} rows, and holding out {percentage} percent of them for validation leaves "
            "none to train on; give validation_file or a smaller validation_split_percentage"
        )
    held_out = replace(split, name="validation", source=f"the first {percentage} percent of {split.source}")
    if not is_stream:
        validation = first_shard.select(range(num_held_out))
        train = first_shard.select(range(num_held_out, num_rows))
    else:
        # Kept in memory: few rows, read at every evaluation, and `take` would divide itself between loader workers.
        validation = Dataset.from_list(list(first_shard.take(num_held_out)))
        remaining = first_shard.filter(_is_after, with_indices=True, fn_kwargs={"num_skipped": num_held_out})
        train = datasets.concatenate_datasets([remaining, *rest])
    return replace(split, dataset=train, first_row=num_held_out), replace(held_out, dataset=validation)


def _split_off_first_shard(dataset: IterableDataset) -> tuple[IterableDataset, list[IterableDataset]]:
    """Return the first file of a stream, and streams of the others.

    `IterableDataset.skip` divides its number between the workers of a data loader, each of which reads other files:
    with two workers, half of the rows held out of the first file would be trained on. A filter on one file alone
    cannot be divided. Halving instead of naming every shard keeps the number of streams logarithmic.
    """
    rest = []
    while dataset.num_shards > 1:
        rest.insert(0, dataset.shard(num_shards=2, index=1))
        dataset = dataset.shard(num_shards=2, index=0)
    return dataset, rest


def _is_after(row: dict, index: int, num_skipped: int) -> bool:
    return index >= num_skipped


@contextmanager
def explained(files: Sequence[str]) -> Iterator[None]:
    """While `datasets` reads files: keep it from logging, and say in one sentence what it could not read."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except Exception as error:
        # A mistake that has its sentence already, a dataset of another origin, a full disk: not to be explained here.
        if not files or isinstance(error, DataError) or isinstance(_root_cause(error), (OSError, MemoryError)):
            raise
        raise DataError(explain_files(files, _root_cause(error))) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def reading(where: str, files: Sequence[str] = ()) -> Iterator[None]:
    """While rows that may be far away are read: say in one sentence what failed and what to do."""
    try:
        yield
    except Exception as error:
        root = _root_cause(error)
        if isinstance(error, (DataError, MemoryError)) or getattr(root, "errno", None) in _OF_THE_DISK:
            raise
        if files and not isinstance(root, OSError) and not any(map(is_url, files)):
            raise DataError(explain_files(files, root)) from error
        raise DataError(
            f"{where} cannot be read ({type(root).__name__}: {_first_line(root)}); see that its files are there and "
            "can be reached, and start again, with --resume_from_checkpoint auto where there is a checkpoint"
        ) from error


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
