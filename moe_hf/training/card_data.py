"""The training data in words for the model card, without paths of this machine."""

import os
import platform
from pathlib import Path

from ..checkpoint.model_card import TrainingData
from .data_arguments import DataArguments, resolve_files


def describe_data(data_args: DataArguments, block_size: int, *, do_eval: bool) -> TrainingData:
    """Say what a model is trained and evaluated on.

    Args:
        data_args: already accepted by `check_data_arguments`.
        block_size: tokens per row.
        do_eval: whether it is evaluated.
    """
    name, is_on_hub = data_args.dataset_name, False
    if name is not None:
        is_on_hub = not os.path.exists(os.path.expanduser(name))
        training = f"`{name}`" if is_on_hub else f"`{Path(name).name}`, a local folder"
        if data_args.dataset_config_name is not None:
            training += f", configuration `{data_args.dataset_config_name}`"
    elif data_args.train_file is not None:
        training = _files(data_args.train_file, "train_file")
    else:
        training = f"source of the Python {platform.python_version()} standard library (the embedded corpus)"
    if data_args.max_train_samples is not None:
        training += f", at most {data_args.max_train_samples:,} rows"
    return TrainingData(
        training=training,
        evaluation=_evaluation(data_args) if do_eval else None,
        rows=f"packing {data_args.packing}, at most {block_size:,} tokens",
        dataset=name if is_on_hub else None,
    )


def _evaluation(data_args: DataArguments) -> str:
    if data_args.validation_file is not None:
        return _files(data_args.validation_file, "validation_file")
    if data_args.dataset_name is not None:
        return f"held-out part of `{Path(data_args.dataset_name).name}`"
    if data_args.train_file is not None:
        return f"{data_args.validation_split_percentage} % of the training data, held out"
    return "every twentieth file of the embedded corpus, held out"


def _files(value: str, flag: str) -> str:
    names = [Path(file).name for file in resolve_files(value, flag)]
    return f"`{names[0]}`" if len(names) == 1 else f"{len(names)} files, `{names[0]}` to `{names[-1]}`"
