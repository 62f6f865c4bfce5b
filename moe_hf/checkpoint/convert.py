"""Write a model as a folder of another architecture, or of ours, one tensor at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError
from . import architectures
from .architectures import Architecture
from .architectures.function import one_sentence
from .architectures.tensors import Read, keep_last
from .export import expected_tensors, write_model_files
from .export_files import CARD_NAME
from .folders import new_folder
from .source import MoESource, copy_side_files, open_model
from .weights import plan_shards, write_weights


def convert(
    path_or_id: str | Path,
    output: str | Path,
    *,
    to: str = MoEConfig.model_type,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    show_progress: bool = False,
) -> None:
    """Write a model of any known architecture to a new folder of another one, or of the same.

    At most one shard, one tensor of the model and one of the output are in memory. Tokenizer and generation
    configuration are copied as they are.

    Args:
        path_or_id: a folder, or `organisation/name` on the hub.
        output: must not be there yet; it is there only when all of it is.
        to: `"moe_hf"` or one of `architectures.names()`.
        dtype: of the written weights; the stored one when not given.
        max_shard_size: as in `save_pretrained`.
        show_progress: draw a progress bar.

    Raises:
        ConfigError, CheckpointError: as `open_model` and `write_model`.
    """
    source = open_model(path_or_id)
    with tqdm(unit="tensor", disable=not show_progress) as bar:
        options = {"max_shard_size": max_shard_size, "on_tensor": lambda name: bar.update()}
        write_model(source, output, to=to, dtype=dtype, **options)


def write_model(
    source: MoESource,
    output: str | Path,
    *,
    to: str = MoEConfig.model_type,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Write a model that can be read tensor by tensor to a new folder, of ours or of another architecture.

    Args:
        source: the model.
        output: must not be there yet; it is there only when all of it is.
        to: `"moe_hf"`, whose folder carries its own code, or one of `architectures.names()`.
        dtype: of the written weights; the source's when not given.
        max_shard_size: as in `save_pretrained`.
        on_tensor: called with each written name before its tensor is read.

    Raises:
        ConfigError: the model cannot be said in the other architecture, or `output` is there.
        CheckpointError: the model cannot be read, its values do not fit into `dtype`, or the disk cannot be written.
    """
    architecture = None if to == MoEConfig.model_type else architectures.get(to)
    config, dtype = source.config, dtype or source.dtype
    if architecture is None:
        expected = expected_tensors(config, dtype)
    else:
        architecture.to_native_config(config)  # refuses before anything is written
        expected = architecture.native_tensors(config, dtype)
    _check_shard_size(expected, max_shard_size)
    read = _casting(source, dtype)
    try:
        with new_folder(output) as folder:
            if architecture is None:
                read = _telling(read, on_tensor) if on_tensor else read
                write_weights(folder, expected, read, max_shard_size=max_shard_size)
                write_model_files(folder, config, dtype)
                if source.model_type == to and (source.folder / CARD_NAME).is_file():
                    shutil.copyfile(source.folder / CARD_NAME, folder / CARD_NAME)
            else:
                options = {"max_shard_size": max_shard_size, "on_tensor": on_tensor}
                write_native_weights(folder, architecture, config, dtype, read, **options)
                write_native_files(folder, architecture, config, dtype)
            copy_side_files(source.folder, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written: {one_sentence(error)}") from error


def write_native_folder(
    folder: Path,
    architecture: Architecture,
    config: MoEConfig,
    dtype: torch.dtype,
    read: Read,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer_folder: Path | None = None,
    generation_config: GenerationConfig | None = None,
    max_shard_size: str = "5GB",
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Write a model to an existing, empty folder as one of `architecture`: weights and all other files.

    Where only one process of several writes, call `write_native_weights` on all of them with `collective=True`, and
    `write_native_files` on the one.

    Args:
        folder: where the files go.
        architecture: from `architectures.get`.
        config: ours, of the model.
        dtype: of the written parameters.
        read: returns one of our tensors by its name.
        tokenizer: saved beside the weights.
        tokenizer_folder: whose tokenizer files and generation configuration are copied instead.
        generation_config: saved beside the weights.
        max_shard_size: as in `save_pretrained`.
        on_tensor: called with each of their names before it is read.

    Raises:
        ConfigError: the model cannot be said in that architecture.
        CheckpointError: a tensor has another shape than its configuration says.
    """
    write_native_weights(folder, architecture, config, dtype, read, max_shard_size=max_shard_size, on_tensor=on_tensor)
    write_native_files(folder, architecture, config, dtype, tokenizer=tokenizer, generation_config=generation_config)
    if tokenizer_folder is not None:
        copy_side_files(tokenizer_folder, folder)


def write_native_weights(
    folder: Path,
    architecture: Architecture,
    config: MoEConfig,
    dtype: torch.dtype,
    read: Read,
    *,
    max_shard_size: str = "5GB",
    on_tensor: Callable[[str], None] | None = None,
    collective: bool = False,
) -> None:
    """Write the weights alone; arguments as in `write_native_folder`, `collective` as in `write_weights`."""
    architecture.to_native_config(config)
    tensors = architecture.tensors(config, dtype)
    read_moe = keep_last(_with_correction_bias(read, config))

    def read_native(name: str) -> torch.Tensor | None:
        return tensors.read_native(name, read_moe)

    read_native = _telling(read_native, on_tensor) if on_tensor else read_native
    expected = tensors.native_tensors()
    write_weights(folder, expected, read_native, max_shard_size=max_shard_size, collective=collective)


def write_native_files(
    folder: Path,
    architecture: Architecture,
    config: MoEConfig,
    dtype: torch.dtype,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Write all that is not a weight; arguments as in `write_native_folder`."""
    native = architecture.to_native_config(config)
    native.dtype = dtype
    native.use_cache = True  # switched off while training
    native.save_pretrained(folder)
    (generation_config or GenerationConfig.from_model_config(native)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _telling(read: Read, on_tensor: Callable[[str], None]) -> Read:
    def tell_and_read(name: str) -> torch.Tensor | None:
        on_tensor(name)
        return read(name)

    return tell_and_read


def _with_correction_bias(read: Read, config: MoEConfig) -> Read:
    """Give zeros for the correction bias of a model that has none."""
    if config.router_balancing == "loss_free":
        return read

    def read_or_zeros(name: str) -> torch.Tensor | None:
        prefix, is_bias, _ = name.rpartition("e_score_correction_bias")
        # From the weight beside it, because a process that does not write gets none of both.
        tensor = read(f"{prefix}weight" if is_bias else name)
        return tensor.new_zeros(len(tensor), dtype=torch.float32) if is_bias and tensor is not None else tensor

    return read_or_zeros


def _casting(source: MoESource, dtype: torch.dtype) -> Read:
    """Return `source.read`, refusing values that `dtype` cannot hold: they would become infinite without a word."""

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        if tensor.is_floating_point() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
            largest = tensor.abs().max().item()
            if largest > torch.finfo(dtype).max:
                raise CheckpointError(f"{name} holds {largest:g}, too much for {dtype}; use another --dtype.")
        return tensor

    return read


def _check_shard_size(expected: dict[str, torch.Tensor], max_shard_size: str) -> None:
    try:
        plan_shards(expected, max_shard_size)
    except ValueError:
        raise ConfigError(f"--max-shard-size {max_shard_size} is not a size such as 500MB or 5GB.") from None
