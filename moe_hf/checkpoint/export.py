"""Write a live model, however it is sharded, as one complete Hugging Face folder."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, UserError
from ..modeling_moe import MoEForCausalLM, MoEModel
from ..parallel.gather_stages import tensor_reader
from ..parallel.processes import raise_together, rank
from .folders import incomplete_name, make_empty, put_in_place
from .weights import write_weights


def expected_tensors(config: MoEConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return every tensor that a saved model of this configuration consists of, on the meta device, by its HF name.

    Parameters have the given dtype; buffers (the router's correction bias) keep their own.
    """
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in model.state_dict().items()}
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
    temporary = incomplete_name(output_dir)
    expected = expected_tensors(model.config, model.dtype)
    reader = tensor_reader(model)

    def read(name: str) -> torch.Tensor | None:
        if on_tensor is not None:
            on_tensor(name)
        try:
            return reader.read(name)
        except KeyError:
            raise CheckpointError(f"The model has no tensor for {name}, so the export would be incomplete.") from None

    raise_together(_attempt(make_empty, temporary) if rank() == 0 else None)
    # If rank 0 fails to write, the other ranks go on gathering: so must rank 0, and say what happened at the end.
    error = _attempt(write_weights, temporary, expected, read, max_shard_size=max_shard_size, collective=True)
    if error is None and rank() == 0:
        error = _attempt(_finish, model, temporary, output_dir, tokenizer, model_card)
    raise_together(error)


def _attempt(function: Callable, *args, **kwargs) -> UserError | None:
    """Call `function` and return what went wrong as an error that all ranks can share."""
    try:
        function(*args, **kwargs)
    except UserError as error:
        return error
    except Exception as error:
        return CheckpointError(f"Could not write the export: {type(error).__name__}: {error}.")
    return None


def _finish(model: MoEForCausalLM, temporary: Path, output_dir: Path, tokenizer, model_card: str | None) -> None:
    write_model_files(
        temporary,
        model.config,
        model.dtype,
        generation_config=getattr(model, "generation_config", None),
        tokenizer=tokenizer,
        model_card=model_card,
    )
    put_in_place(temporary, output_dir)


def write_model_files(
    folder: Path,
    config: MoEConfig,
    dtype: torch.dtype,
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_card: str | None = None,
) -> None:
    """Add to `folder` all that is not a weight: configuration, the source of the classes, tokenizer, README."""
    config = MoEConfig.from_dict(config.to_dict())
    config.architectures = [MoEForCausalLM.__name__]
    config.dtype = dtype
    # Writes the source of the model's classes, and where they are found into the config.
    with torch.device("meta"):
        custom_object_save(MoEForCausalLM(config), folder, config=config)
    config.auto_map["AutoModel"] = f"modeling_moe.{MoEModel.__name__}"
    config.use_cache = True  # switched off while training
    config.save_pretrained(folder)
    generation_config = generation_config or GenerationConfig.from_model_config(config)
    generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model_card is not None:
        (folder / "README.md").write_text(model_card)
