"""Write an upcycled model tensor by tensor."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ...configuration_moe import MoEConfig
from ...errors import CheckpointError
from ..export import expected_tensors, write_model_files
from ..folders import new_folder
from ..source import copy_side_files, open_model
from ..weights import write_weights
from .methods import ExpertMatrix, seeded
from .recipe import UpcyclingRecipe, upcycled_config


def upcycle(
    model: str | Path,
    output: str | Path,
    recipe: UpcyclingRecipe,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    show_progress: bool = False,
) -> MoEConfig:
    """Write to `output` the mixture of experts that `recipe` makes of a dense model; it loads like any `moe_hf` folder.

    Weights are read, made and written one by one: what is held is one shard of the output, and of a sparse layer one
    tensor with the two dense matrices that it comes from.

    Args:
        model: folder or hub id of a dense model.
        output: a folder that is not there yet.
        recipe: what is made of it.
        dtype: of the weights written; that of the model when not given.
        max_shard_size: as in `save_pretrained`.
        show_progress: draw a progress bar.

    Returns:
        The configuration written.

    Raises:
        ConfigError: `output` is there, the model is not dense, or the recipe does not fit it.
        CheckpointError: the model cannot be read, its values do not fit into `dtype`, or the disk cannot be written.
    """
    source = open_model(model)
    config = upcycled_config(source.config, recipe)
    dtype = dtype or source.dtype
    expected = expected_tensors(config, dtype)
    try:
        with (
            new_folder(output) as folder,
            tqdm(total=len(expected), desc="upcycling", unit="tensor", disable=not show_progress) as bar,
        ):

            def read(name: str) -> torch.Tensor:
                bar.update()
                tensor = upcycled_tensor(name, expected[name], config, recipe, source.read)
                return _cast(name, tensor, expected[name].dtype)

            write_weights(folder, expected, read, max_shard_size=max_shard_size)
            write_model_files(folder, config, dtype)
            copy_side_files(source.folder, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written: {' '.join(str(error).split())}.") from error
    return config


def upcycled_tensor(
    name: str,
    expected: torch.Tensor,
    config: MoEConfig,
    recipe: UpcyclingRecipe,
    read: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    """Return one tensor of the sparse model: made of those of the dense one, or the same.

    Args:
        name: of the tensor.
        expected: its shape and dtype, on the meta device.
        config: of the sparse model.
        recipe: how it is made.
        read: returns a tensor of the dense model.
    """
    block, _, rest = name.rpartition(".mlp.")
    make = partial(_make_experts, expected, f"{block}.mlp", recipe, read)
    match rest:
        case "experts.gate_up_proj":
            return make(("gate_proj", "up_proj"))
        case "experts.down_proj":
            return make(("down_proj",))
        case "gate.weight":
            std = config.initializer_range if recipe.router_std is None else recipe.router_std
            return recipe.method.router(expected.shape, std, seeded(recipe.seed, "router", name))
        case "gate.e_score_correction_bias":
            return torch.zeros(expected.shape, dtype=expected.dtype)
    return read(name)


def _make_experts(
    expected: torch.Tensor,
    mlp: str,
    recipe: UpcyclingRecipe,
    read: Callable[[str], torch.Tensor],
    projections: tuple[str, ...],
) -> torch.Tensor:
    """Return the given matrices of all experts, one below the other: `(E, len(projections) * rows, columns)`."""
    experts = torch.empty(expected.shape, dtype=expected.dtype)
    for i, projection in enumerate(projections):
        dense = read(f"{mlp}.{projection}.weight").float()
        units = dense.T if projection == "down_proj" else dense
        for expert, target in enumerate(experts):
            matrix = ExpertMatrix(mlp, projection, expert, len(experts), recipe.seed)
            made = recipe.method.expert(units, matrix)
            target.chunk(len(projections))[i].copy_(made.T if projection == "down_proj" else made)
    return experts


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in the dtype it is written in; what does not fit would become infinite without a word."""
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds values that are not finite in {dtype}; use another --dtype.")
    return tensor
