"""This rank's stage of a pipeline, from a configuration and random or saved weights."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from ..checkpoint.weights import SafetensorsFolder
from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from ..parallel.parallel_sizes import ParallelSizes
from ..parallel.pipeline_layout import plan_pipeline
from ..parallel.processes import rank, world_size


def build_pipelined_model(
    config: MoEConfig,
    weights: str | Path | None,
    sizes: ParallelSizes,
    partition: str,
    implementations: dict[str, str],
) -> torch.nn.Module:
    """Build the stage of this rank, of which alone there is memory needed; the process group exists.

    Args:
        config: of the whole model.
        weights: folder of saved weights, `None` for the random ones that one process would draw.
        sizes: with the number of stages.
        partition: how layers are divided, one of `PARTITIONS`.
        implementations: of attention and experts, as `_from_config` takes them.

    Raises:
        CheckpointError: the folder lacks a tensor of this stage.
    """
    from ..parallel.pipeline_module import PipelinedCausalLM
    from ..parallel.pipeline_stage import PipelineStage, fill_randomly

    for name, value in implementations.items():
        setattr(config, f"_{name}", value)
    config.dtype = torch.float32
    layout = plan_pipeline(config, sizes.pipeline, world_size(), partition)
    stage = PipelineStage(config, layout, rank() // layout.data_parallel_size)
    if weights is None:
        fill_randomly(stage)
    else:
        _load(stage, Path(weights))
    return PipelinedCausalLM(stage, layout)


def _load(stage, folder: Path) -> None:
    saved = SafetensorsFolder(folder)
    try:
        stage.load(saved.read)
    except KeyError as missing:
        raise CheckpointError(f"{folder} has no tensor {missing}; copy the folder again.") from None
    if (folder / "generation_config.json").is_file():
        stage.generation_config = GenerationConfig.from_pretrained(folder)
