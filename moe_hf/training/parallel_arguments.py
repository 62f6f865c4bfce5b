"""Flags that say how ranks share a model, and the DeepSpeed JSON that they make."""

import argparse
from dataclasses import dataclass, field, fields

from ..errors import ConfigError
from ..parallel.deepspeed_config import Config, with_expert_parallel_size
from ..parallel.offload import with_nvme_path
from ..parallel.parallel_sizes import with_parallel_sizes


@dataclass
class ParallelArguments:
    """Sizes that override those of the DeepSpeed JSON; without a flag the JSON decides."""

    expert_parallel_size: int | None = field(
        default=None,
        metadata={"help": "Ranks that share one set of experts; overrides the DeepSpeed JSON. 0 switches AutoEP off."},
    )
    tensor_parallel_size: int | None = field(
        default=None,
        metadata={"help": "Ranks that share every weight matrix; overrides the DeepSpeed JSON. 1 switches it off."},
    )
    sequence_parallel_size: int | None = field(
        default=None,
        metadata={"help": "Ranks that share every sequence; overrides the DeepSpeed JSON. 1 switches it off."},
    )
    pipeline_parallel_size: int | None = field(
        default=None,
        metadata={"help": "Ranks that share the layers of one model; overrides the DeepSpeed JSON. 1 switches it off."},
    )
    nvme_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder on a local disk of every machine for what the DeepSpeed JSON offloads to NVMe; overrides "
            "its nvme_path."
        },
    )


def with_flags(config: Config, namespace: argparse.Namespace) -> Config:
    """Return a copy of a DeepSpeed JSON in which sizes and the path to NVMe are those of the command line.

    Raises:
        ConfigError: a size is no integer that could be one, or nothing goes to NVMe.
    """
    if namespace.expert_parallel_size is not None:
        config = with_expert_parallel_size(config, namespace.expert_parallel_size)
    config = with_nvme_path(config, namespace.nvme_path)
    return with_parallel_sizes(
        config,
        tensor=namespace.tensor_parallel_size,
        sequence=namespace.sequence_parallel_size,
        pipeline=namespace.pipeline_parallel_size,
    )


def check_deepspeed_is_there(namespace: argparse.Namespace) -> None:
    """Refuse sizes that only DeepSpeed can give, in a run without it.

    Raises:
        ConfigError: a size stands on the command line without `--deepspeed`.
    """
    for flag in fields(ParallelArguments):
        size = getattr(namespace, flag.name)
        if size and size != (0 if flag.name == "expert_parallel_size" else 1):
            raise ConfigError(f"{flag.name}={size} needs DeepSpeed; add --deepspeed ds_configs/zero3_ep.json.")
