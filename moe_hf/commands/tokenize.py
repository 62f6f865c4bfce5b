"""`moe-hf tokenize`: turn text into token ids once, for runs on more data than one wants to prepare at each start."""

import argparse
import dataclasses
import re

from ..errors import ConfigError, DataError

# The flags of run_clm_moe.py that say which text it is, and how it is tokenized.
_DATA_FLAGS = (
    "train_file",
    "validation_file",
    "dataset_name",
    "dataset_config_name",
    "streaming",
    "text_column",
    "cache_dir",
    "append_eos",
    "keep_linebreaks",
    "validation_split_percentage",
)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "tokenize",
        help="turn text into token ids that training reads from the disk",
        description="Writes a folder for run_clm_moe.py --tokenized_data. Without train_file and dataset_name the "
        "text is the embedded corpus.",
    )
    parser.add_argument("--tokenizer_name", required=True, help="folder or hub id of a tokenizer")
    parser.add_argument("--output_dir", required=True, help="folder that is to be written")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenized data that is there")
    parser.add_argument("--shard_size", default="100M", help="tokens in one file, as in 100M or 2B (default: 100M)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that tokenize (default: 1)")
    _add_data_flags(parser)
    parser.set_defaults(run=_tokenize)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Declare flags of training with their own names, defaults and help."""
    from ..data.arguments import DataArguments

    for field in dataclasses.fields(DataArguments):
        if field.name not in _DATA_FLAGS:
            continue
        options = {"default": field.default, "help": field.metadata["help"].replace("%", "%%")}
        if isinstance(field.default, bool):
            # As in Transformers' parser: --streaming, and --append_eos False.
            options |= {"type": _bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            options["type"] = int if isinstance(field.default, int) else str
        parser.add_argument(f"--{field.name}", **options)


def _tokenize(arguments: argparse.Namespace) -> None:
    shard_tokens = _parse_size(arguments.shard_size)
    if arguments.num_proc < 1:
        raise ConfigError(f"--num_proc {arguments.num_proc} must be at least 1.")

    from ..data.arguments import DataArguments, check_data_arguments
    from ..data.tokenizing import check_destination, tokenize_to_folder

    data_args = DataArguments(**{name: getattr(arguments, name) for name in _DATA_FLAGS})
    check_data_arguments(data_args)
    check_destination(arguments.output_dir, arguments.overwrite)
    try:
        record = tokenize_to_folder(
            data_args,
            _load_tokenizer(arguments.tokenizer_name),
            arguments.output_dir,
            shard_tokens=shard_tokens,
            num_proc=arguments.num_proc,
            overwrite=arguments.overwrite,
            show_progress=True,
        )
    except OSError as error:
        raise DataError(f"--output_dir {arguments.output_dir} was not written: {error}.") from error
    for name, split in record.splits.items():
        size = sum(shard.size for shard in split.shards)
        print(
            f"{name}: {split.num_tokens:,} tokens of {split.num_documents:,} documents, {size / split.num_tokens:.3f} "
            f"bytes per token, files: {len(split.shards)}"
        )
    print(f"Train on them with: run_clm_moe.py --tokenized_data {arguments.output_dir}")


def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer_name {name} cannot be loaded: {' '.join(str(error).split())}") from None


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text, re.IGNORECASE)
    tokens = int(float(match[1]) * _FACTORS[match[2].upper()]) if match else 0
    if tokens < 1:
        raise ConfigError(f"--shard_size {text} must be a number of tokens, such as 500K, 100M or 2B.")
    return tokens


def _bool(text: str) -> bool:
    from transformers.hf_argparser import string_to_bool

    return string_to_bool(text)
