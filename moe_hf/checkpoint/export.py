"""Write a live model, however it is sharded, as one complete Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, UserError
from ..modeling_moe import MoEForCausalLM, MoEModel
from ..parallel.gather import FullTensorReader
from ..parallel.processes import raise_together, rank

INDEX_NAME = "model.safetensors.index.json"


def expected_tensors(config: MoEConfig) -> dict[str, torch.Tensor]:
    """Return every tensor that a saved model of this configuration consists of, on the meta device, by its HF name."""
    with torch.device("meta"):
        state = MoEForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def export_model(
    model: MoEForCausalLM,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_card: str | None = None,
    max_shard_size: str = "5GB",
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Write `model` to `output_dir` in Hugging Face format; every rank must call it (a collective).

    Tensors are gathered and written one shard at a time, so that rank 0 holds one shard plus one tensor in host
    memory. The folder is written under a temporary name, checked against the model's full list of names and shapes,
    and renamed when whole: a reader never sees a folder that is half written.

    Args:
        model: the live model, plain or inside a DeepSpeed engine, in the dtype to export.
        output_dir: where the folder goes; an export that is there is replaced.
        tokenizer: saved beside the weights.
        model_card: text of the README.
        max_shard_size: as in `save_pretrained`.
        on_tensor: called with each name before it is gathered.

    Raises:
        CheckpointError: the model lacks a tensor, or rank 0 could not write; on all ranks alike.
    """
    output_dir = Path(output_dir)
    temporary = output_dir.with_name(f".{output_dir.name}.incomplete")
    expected = expected_tensors(model.config)
    plan = split_torch_state_dict_into_shards(expected, max_shard_size=max_shard_size)
    reader = FullTensorReader(model)

    error = _guarded(_make_empty, temporary)
    raise_together(error)
    for filename, names in plan.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        for name in names:
            if on_tensor is not None:
                on_tensor(name)
            tensor = _read(reader, name)
            if tensor is not None and tensor.shape != expected[name].shape:
                wanted = tuple(expected[name].shape)
                error = CheckpointError(f"{name} has shape {tuple(tensor.shape)} but the model's is {wanted}.")
            elif tensor is not None:
                shard[name] = tensor
        if error is None:
            # If this fails the other ranks go on gathering: so must rank 0, and say what happened at the end.
            error = _guarded(save_file, shard, temporary / filename, {"format": "pt"})
    if error is None:
        error = _guarded(_finish, model, temporary, output_dir, plan, expected, tokenizer, model_card)
    raise_together(error)


def _read(reader: FullTensorReader, name: str) -> torch.Tensor | None:
    try:
        return reader.read(name)
    except KeyError:
        raise CheckpointError(f"The model has no tensor for {name}, so the export would be incomplete.") from None


def _guarded(write: Callable, *args) -> UserError | None:
    """Call `write` on rank 0 and return what went wrong there as an error that all ranks can share."""
    if rank() != 0:
        return None
    try:
        write(*args)
    except UserError as error:
        return error
    except Exception as error:
        return CheckpointError(f"Could not write the export: {type(error).__name__}: {error}.")
    return None


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _finish(model, temporary: Path, output_dir: Path, plan, expected, tokenizer, model_card) -> None:
    """Add all that is not a weight, verify, and put the folder in its place."""
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    config = MoEConfig.from_dict(model.config.to_dict())
    config.architectures = [MoEForCausalLM.__name__]
    config.dtype = model.dtype
    # Writes the source of the model's classes, and where they are found into the config.
    custom_object_save(model, temporary, config=config)
    config.auto_map["AutoModel"] = f"modeling_moe.{MoEModel.__name__}"
    config.use_cache = True  # switched off while training
    config.save_pretrained(temporary)
    generation_config = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(config)
    generation_config.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if model_card is not None:
        (temporary / "README.md").write_text(model_card)
    verify_export(temporary, expected, list(plan.filename_to_tensors))
    _sync_to_disk(temporary)
    _replace_folder(temporary, output_dir)


def verify_export(folder: Path, expected: dict[str, torch.Tensor], filenames: list[str]) -> None:
    """Raise `CheckpointError` unless the files in `folder` hold exactly the expected names and shapes."""
    found: dict[str, list[int]] = {}
    for filename in filenames:
        with safe_open(folder / filename, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"The export is wrong: missing {missing[:3] or 'nothing'}, surplus {surplus[:3] or 'none'}."
        )
    for name, shape in found.items():
        if list(expected[name].shape) != list(shape):
            raise CheckpointError(f"{name} was written with shape {shape}, not {list(expected[name].shape)}.")


def _sync_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_folder(source: Path, destination: Path) -> None:
    """Rename `source` to `destination`; a folder that is there is moved aside first and deleted last."""
    if not destination.exists():
        os.replace(source, destination)
        return
    aside = destination.with_name(f".{destination.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(destination, aside)
    os.replace(source, destination)
    shutil.rmtree(aside)
