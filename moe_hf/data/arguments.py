"""The flags that say which text to train on, and the checks that need nothing but the files.

The names and meanings are those of Transformers' `run_clm.py`. Everything here is cheap and imports neither torch
nor `datasets`: every rank checks its arguments before it joins the others, so that a typing error ends the run at
once instead of leaving some ranks waiting.
"""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

import fsspec

from ..errors import DataError
from .mixture_file import sources_of
from .tokenized_folder import check_shards, read_record

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File extension to the `datasets` builder that reads it."""

DEFAULT_SHUFFLE_BUFFER = 1000

PACKINGS = ("blocks", "documents", "pad")

_FLAGS_OF_TOKENIZED_DATA = {
    "tokenized_data",
    "tokenizer_name",
    "cache_dir",
    "overwrite_cache",
    "preprocessing_num_workers",
    "block_size",
    "packing",
    "max_train_samples",
    "max_eval_samples",
}


@dataclass
class DataArguments:
    """What to train and evaluate on, and how text becomes rows of tokens."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Training data: a .txt, .json, .jsonl, .csv or .parquet file, a glob, or a URL."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data: a file or a glob."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, a folder of data files, or one written by save_to_disk."}
    )
    dataset_mixture: str | None = field(
        default=None, metadata={"help": "YAML or JSON file that lists several sources of training data with weights."}
    )
    tokenized_data: str | None = field(
        default=None, metadata={"help": "Folder of token ids that moe-hf tokenize has written, instead of text."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset given by dataset_name."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of preparing all data."})
    streaming_shuffle_buffer: int = field(
        default=DEFAULT_SHUFFLE_BUFFER,
        metadata={"help": "Documents of a streamed training set that are shuffled together; 0 keeps its order."},
    )
    streaming_partitions: int | None = field(
        default=None,
        metadata={
            "help": "Parts of a stream (default: processes times loader workers). A run can go on with any number of "
            "processes that divides it."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text (default: text, or the only column of strings)."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer name or folder, when it is not the one beside the model."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared data and downloads are kept (default: the Hugging Face cache)."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize and pack again, ignoring cached results."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; streaming does not use them."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per row (default: what tokenizer and model allow, at most 1024)."}
    )
    packing: str = field(
        default="blocks",
        metadata={"help": "blocks: join and cut; documents: the same, attention stays inside each; pad: one per row."},
    )
    append_eos: bool = field(
        default=True, metadata={"help": "End every document with the eos token; joined .txt lines never get one."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of .txt files."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percent of the training data held out when there is no validation data."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most this many rows, counted after packing."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many rows, counted after packing."}
    )


def resolve_files(value: str, flag: str) -> list[str]:
    """Expand a path, a glob, or several of them separated by spaces into existing data files.

    Args:
        value (`str`): What the user gave. A path that exists is taken as it is, brackets and spaces included. URLs
            are not looked at.
        flag (`str`): Name of the argument, for the messages.

    Returns:
        `list[str]`: Paths of non-empty files of one format, sorted within each glob.

    Raises:
        DataError: Nothing there, a folder, an empty file, an extension without a reader, or mixed formats.
    """
    files = _expand(value)
    if not files and len(value.split()) > 1:
        parts = [_expand(part) for part in value.split()]
        files = [file for part in parts for file in part] if all(parts) else []
    if not files:
        what = "matches no file" if glob.has_magic(value) else "does not exist"
        raise DataError(f"{flag} {value!r} {what}; give the path of a data file or a glob such as 'data/*.jsonl'")
    for file in files:
        if is_url(file):
            _check_protocol(file, flag)
        elif os.path.isdir(file):
            raise DataError(f"{flag} {file!r} is a folder; give a file or a glob such as '{file.rstrip('/')}/*.jsonl'")
        if _extension(file) not in BUILDERS:
            raise DataError(f"{flag} {file!r} has an unsupported extension; use one of {', '.join(BUILDERS)}")
        if not is_url(file) and os.path.getsize(file) == 0:
            raise DataError(f"{flag} {file!r} is empty; give a file that holds text")
    extensions = sorted({_extension(file) for file in files})
    if len({BUILDERS[extension] for extension in extensions}) > 1:
        raise DataError(f"{flag} {value!r} mixes {' and '.join(extensions)} files; give files of one format")
    return files


def _check_protocol(url: str, flag: str) -> None:
    try:
        fsspec.get_filesystem_class(url.split("://")[0])
    except (ImportError, ValueError) as error:
        raise DataError(f"{flag} {url!r} cannot be read here: {' '.join(str(error).split())}") from None


def is_url(file: str) -> bool:
    """Tell a URL such as `https://host/data.jsonl` from a path."""
    return re.match(r"[a-z0-9+.-]+://", file, re.IGNORECASE) is not None


def builder_of(files: Sequence[str]) -> str:
    """Return the `datasets` builder for files that `resolve_files` accepted."""
    return BUILDERS[_extension(files[0])]


def check_data_arguments(data_args: DataArguments) -> None:
    """Refuse what can be seen to be wrong without loading any data; cheap enough to run on every rank.

    Raises:
        DataError: Missing, empty or unsupported files, contradicting sources, an unknown packing, or a number out
            of its range.
    """
    if data_args.packing not in PACKINGS:
        raise DataError(f"packing={data_args.packing!r} is unknown; use one of {', '.join(PACKINGS)}")
    if not 0 <= data_args.validation_split_percentage <= 100:
        value = data_args.validation_split_percentage
        raise DataError(f"validation_split_percentage={value} is out of range; use 0 to 100")
    if data_args.block_size is not None and data_args.block_size < 2:
        raise DataError(f"block_size={data_args.block_size} leaves no next token to predict; use 2 or more")
    for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers", "streaming_partitions"):
        value = getattr(data_args, name)
        if value is not None and value < 1:
            raise DataError(f"{name}={value} is out of range; use 1 or more, or leave it out")
    if data_args.streaming_shuffle_buffer < 0:
        raise DataError(f"streaming_shuffle_buffer={data_args.streaming_shuffle_buffer} is negative; use 0 or more")
    if data_args.tokenized_data is not None:
        _check_tokenized_data(data_args)
        return
    _check_streaming(data_args)
    _check_sources(data_args)
    if data_args.dataset_mixture is not None:
        _check_mixture(data_args)


def find_bad_line(file: str) -> str | None:
    """Name the first line that is not UTF-8 or, in a JSON file, not valid; the slow way, for a file known to be bad.

    Returns:
        `str`, *optional*: One sentence with file and line, counted from 1; None when every line is well.
    """
    is_json = BUILDERS[_extension(file)] == "json"
    with open(file, "rb") as stream:
        # A .json file is either one document over many lines or, like .jsonl, one object per line.
        is_document = _extension(file) == ".json" and not isinstance(_parse(stream.readline()), dict)
        stream.seek(0)
        for number, raw in enumerate([stream.read()] if is_document else stream, start=1):
            try:
                # Without the line break: what is missing at the end of a line would be found on the next.
                value = json.loads(raw.rstrip().decode("utf-8")) if is_json and raw.strip() else {}
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                number += raw.count(b"\n", 0, error.start)
                return f"{file!r}, line {number}: byte {raw[error.start]:#04x} is not UTF-8; convert the file to UTF-8"
            except json.JSONDecodeError as error:
                number += error.lineno - 1
                return f"{file!r}, line {number}: invalid JSON ({error.msg}); correct or remove this line"
            if not is_document and not isinstance(value, dict):
                kind = type(value).__name__
                return f"{file!r}, line {number}: a JSON {kind}, where an object with the text in a field is needed"
    return None


def _check_streaming(data_args: DataArguments) -> None:
    if not data_args.streaming and data_args.streaming_partitions is not None:
        value = data_args.streaming_partitions
        raise DataError(f"streaming_partitions={value} has no effect without streaming; add it or leave this out")
    if not data_args.streaming and data_args.streaming_shuffle_buffer != DEFAULT_SHUFFLE_BUFFER:
        value = data_args.streaming_shuffle_buffer
        raise DataError(f"streaming_shuffle_buffer={value} has no effect without streaming; add it or leave this out")
    if data_args.streaming and data_args.max_train_samples is not None:
        raise DataError(
            f"max_train_samples={data_args.max_train_samples} does not go with streaming, which reads no more than "
            "max_steps needs; leave one of them out"
        )


def _check_mixture(data_args: DataArguments) -> None:
    """Refuse a mixture of sources that are wrong, each for itself, or do not go together."""
    path = data_args.dataset_mixture
    for flag in ("train_file", "dataset_name"):
        if getattr(data_args, flag) is not None:
            value = getattr(data_args, flag)
            raise DataError(f"dataset_mixture={path!r} and {flag}={value!r} both given; put it into the mixture")
    for source in sources_of(data_args):
        _check_sources(source.data_args)
        value = source.data_args.train_file
        if (
            value is not None
            and builder_of(resolve_files(value, "train_file")) == "text"
            and data_args.packing != "pad"
        ):
            raise DataError(
                f"train_file {value!r} of {path!r} holds lines of text, and a mixture draws documents; use .jsonl or "
                ".parquet with one document per row"
            )


def _check_sources(data_args: DataArguments) -> None:
    """Refuse sources that are missing or contradict each other."""
    name = data_args.dataset_name
    if name is not None:
        for flag in ("train_file", "validation_file"):
            if getattr(data_args, flag) is not None:
                raise DataError(f"dataset_name={name!r} and {flag}={getattr(data_args, flag)!r} both given; give one")
        # Names on the Hub look like "owner/name"; these can only be meant as folders.
        if name.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(name)):
            raise DataError(f"dataset_name {name!r} does not exist; give a folder with data or a dataset on the Hub")
    elif data_args.dataset_config_name is not None:
        raise DataError(
            f"dataset_config_name={data_args.dataset_config_name!r} has no effect alone; give dataset_name too"
        )
    for flag in ("train_file", "validation_file"):
        value = getattr(data_args, flag)
        if value is None:
            continue
        if builder_of(resolve_files(value, flag)) == "text" and data_args.packing == "documents":
            raise DataError(
                f"packing='documents' needs to know where documents end, but {flag} {value!r} holds lines of text; "
                "use .jsonl or .parquet with one document per row, or packing='blocks'"
            )


def _check_tokenized_data(data_args: DataArguments) -> None:
    """Refuse what was decided when the data was tokenized, and a folder that is not whole."""
    folder = data_args.tokenized_data
    for flag in fields(data_args):
        value = getattr(data_args, flag.name)
        if flag.name not in _FLAGS_OF_TOKENIZED_DATA and value != flag.default:
            raise DataError(
                f"{flag.name}={value!r} has no effect with tokenized_data={folder!r}, for which it was decided by "
                "moe-hf tokenize; leave one of them out"
            )
    if data_args.packing == "pad":
        raise DataError("packing='pad' does not go with tokenized_data, which is joined; use blocks or documents")
    record = read_record(folder)
    check_shards(folder, record)
    if data_args.packing == "documents" and any(split.is_lines for split in record.splits.values()):
        raise DataError(
            f"packing='documents' needs to know where documents end, but tokenized_data {folder!r} was made of lines "
            "of text; use packing='blocks', or tokenize .jsonl or .parquet with one document per row"
        )


def _expand(value: str) -> list[str]:
    if is_url(value):
        return [value] if len(value.split()) == 1 else []
    value = os.path.expanduser(value)
    return [value] if os.path.exists(value) else sorted(glob.glob(value, recursive=True))


def _extension(file: str) -> str:
    return os.path.splitext(urlsplit(file).path if is_url(file) else file)[1].lower()


def _parse(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None
