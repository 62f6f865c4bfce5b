"""Which stage of a pipeline holds which part of a model, and how pipelines lie on the ranks."""

from dataclasses import dataclass

import torch

from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM

# How `pipeline.partition` of the DeepSpeed JSON may cut the layers; "best" is DeepSpeed's own default.
PARTITIONS = ("best", "parameters", "uniform")


@dataclass(frozen=True)
class PipelineLayout:
    """Decoder layers by stage: the first stage has the embeddings besides, the last one the final norm and the head.

    Ranks are numbered stage by stage, as DeepSpeed's `PipeDataParallelTopology` does: `rank = stage * D + data rank`,
    with D pipelines side by side.

    Args:
        bounds: stage s has the layers from `bounds[s]` up to `bounds[s + 1]`.
        data_parallel_size: D.
    """

    bounds: tuple[int, ...]
    data_parallel_size: int

    @property
    def num_stages(self) -> int:
        """Ranks that share one model."""
        return len(self.bounds) - 1

    def layers(self, stage: int) -> range:
        """Return the decoder layers of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of(self, name: str) -> int:
        """Return the stage that holds the tensor with this Hugging Face name."""
        if name.startswith("model.embed_tokens."):
            return 0
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            return next(stage for stage in range(self.num_stages) if layer in self.layers(stage))
        return self.num_stages - 1

    def first_rank(self, stage: int) -> int:
        """Return the lowest of the ranks that hold a stage."""
        return stage * self.data_parallel_size


def plan_pipeline(config: MoEConfig, num_stages: int, world_size: int, partition: str = "best") -> PipelineLayout:
    """Cut the layers of a model into consecutive stages, none of them without a layer.

    Args:
        config: with at least as many layers as stages.
        num_stages: at least 1.
        world_size: a multiple of the number of stages.
        partition: one of `PARTITIONS`: as many layers for every stage (`"uniform"`), or as equal a number of parameters
            as can be, embeddings and head included.
    """
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    if partition == "uniform":
        bounds = partition_uniform(config.num_hidden_layers, num_stages)
    else:
        bounds = partition_balanced(_weights(config), num_stages)
    return PipelineLayout(tuple(int(bound) for bound in bounds), world_size // num_stages)


def _weights(config: MoEConfig) -> list[int]:
    """Return the number of parameters of every layer, those at the ends with what else their stages hold."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    counts = [_num_parameters(layer) for layer in model.model.layers]
    counts[0] += _num_parameters(model.model.embed_tokens)
    counts[-1] += _num_parameters(model.model.norm) + _num_parameters(model.lm_head)
    return counts


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
