"""The training data in words for the model card, without paths of this machine."""

import os
import platform
from pathlib import Path

from ..checkpoint.model_card import TrainingData
from ..data.arguments import DataArguments, resolve_files
from ..data.files import STREAM_PROBE_ROWS
from ..data.mixture_file import sources_of
from ..data.tokenized_folder import read_record


def describe_data(data_args: DataArguments, block_size: int, *, do_eval: bool) -> TrainingData:
    """Say what a model is trained and evaluated on.

    Args:
        data_args: already accepted by `check_data_arguments`.
        block_size: tokens per row.
        do_eval: whether it is evaluated.
    """
    sources = sources_of(data_args)
    total = sum(source.weight for source in sources)
    training = " and ".join(
        _source(source.data_args) + (f" ({source.weight / total:.0%})" if len(sources) > 1 else "")
        for source in sources
    )
    if data_args.max_train_samples is not None:
        training += f", at most {data_args.max_train_samples:,} rows"
    return TrainingData(
        training=training,
        evaluation=_evaluation(data_args) if do_eval else None,
        rows=f"packing {data_args.packing}, at most {block_size:,} tokens",
        dataset=next(filter(None, (_name_on_hub(source.data_args) for source in sources)), None),
    )


def _name_on_hub(data_args: DataArguments) -> str | None:
    name = data_args.dataset_name
    return None if name is None or os.path.exists(os.path.expanduser(name)) else name


def _source(data_args: DataArguments) -> str:
    if data_args.dataset_name is not None:
        name = _name_on_hub(data_args)
        described = f"`{name}`" if name else f"`{Path(data_args.dataset_name).name}`, a local folder"
        config = data_args.dataset_config_name
        return described if config is None else f"{described}, configuration `{config}`"
    if data_args.tokenized_data is not None:
        record = read_record(data_args.tokenized_data)
        return f"{record.splits['train'].num_tokens:,} tokens of `{Path(data_args.tokenized_data).name}`"
    if data_args.train_file is not None:
        return _files(data_args.train_file, "train_file")
    return f"source of the Python {platform.python_version()} standard library (the embedded corpus)"


def _evaluation(data_args: DataArguments) -> str:
    if data_args.validation_file is not None:
        return _files(data_args.validation_file, "validation_file")
    if data_args.tokenized_data is not None:
        return f"validation split of `{Path(data_args.tokenized_data).name}`"
    if data_args.dataset_mixture is not None:
        return "held-out rows of every source"
    if data_args.dataset_name is not None:
        return f"held-out part of `{Path(data_args.dataset_name).name}`"
    if data_args.train_file is not None and data_args.streaming:
        return f"{data_args.validation_split_percentage} % of the first {STREAM_PROBE_ROWS:,} rows, held out"
    if data_args.train_file is not None:
        return f"{data_args.validation_split_percentage} % of the training data, held out"
    return "every twentieth file of the embedded corpus, held out"


def _files(value: str, flag: str) -> str:
    names = [Path(file).name for file in resolve_files(value, flag)]
    return f"`{names[0]}`" if len(names) == 1 else f"{len(names)} files, `{names[0]}` to `{names[-1]}`"
