"""The sizes of tensor, sequence and pipeline parallelism: where the DeepSpeed JSON has them, what replaces them.

Expert parallelism lies within data parallelism and has its own functions in `deepspeed_config`; the three kinds here
divide the ranks: `world size = data x tensor x sequence x pipeline`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

from ..errors import ConfigError
from .deepspeed_config import Config, get_section, is_int, lookup, mistake

# Where each size stands in the JSON.
_KEYS = {"tensor": "tensor_parallel.autotp_size", "sequence": "sequence_parallel_size", "pipeline": "pipeline.stages"}


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks that share every tensor, every sequence, and the layers of one model; 1 where they share none."""

    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1

    def data_parallel_size(self, world_size: int) -> int:
        """Return how many ranks read different rows.

        Raises:
            ConfigError: the sizes do not divide the number of ranks.
        """
        product = self.tensor * self.sequence * self.pipeline
        if world_size % product:
            named = self.named()
            together = f"{' x '.join(named)} = {product}" if len(named) > 1 else named[0]
            raise mistake(
                "world_size", world_size, f"is no multiple of {together}; start a multiple of {product} ranks"
            )
        return world_size // product

    def named(self) -> list[str]:
        """Return the kinds that are on, such as `tensor_parallel_size=2`."""
        return [f"{f.name}_parallel_size={size}" for f in fields(self) if (size := getattr(self, f.name)) > 1]


def parallel_sizes(config: Config | None) -> ParallelSizes:
    """Return the sizes that a DeepSpeed JSON names; 1 everywhere without one.

    Raises:
        ConfigError: a size is no positive integer.
    """
    sizes = ParallelSizes(**{name: lookup(config or {}, key, 1) for name, key in _KEYS.items()})
    for name, key in _KEYS.items():
        _check(key, getattr(sizes, name))
    return sizes


def check_only_one(config: Config) -> None:
    """Refuse two of these kinds in one run.

    Raises:
        ConfigError: naming both.
    """
    named = parallel_sizes(config).named()
    if len(named) > 1:
        raise ConfigError(
            f"{' and '.join(named)} do not combine, because DeepSpeed has no groups of ranks for both; "
            "use one of them, beside expert_parallel_size and ZeRO"
        )


def with_parallel_sizes(config: Config, **sizes: int | None) -> Config:
    """Return a copy of a DeepSpeed JSON with other sizes; `None` leaves what the file says.

    Args:
        config (`dict`): the DeepSpeed JSON, left as it is.
        **sizes: `tensor`, `sequence` or `pipeline`; 1 switches one off.

    Raises:
        ConfigError: if a size is no positive integer.
    """
    config = copy.deepcopy(config)
    for name, size in sizes.items():
        if size is None:
            continue
        _check(f"{name}_parallel_size", size)
        *path, key = _KEYS[name].split(".")
        section = config
        for part in path:
            section = config[part] = get_section(config, part)
        section.pop(key, None)
        if size > 1:  # DeepSpeed takes some keys for a wish even where they say 1
            section[key] = size
        elif section == {}:
            del config[path[0]]
    return config


def _check(key: str, size: object) -> None:
    if not is_int(size) or size < 1:
        raise mistake(key, size, "must be a positive integer; 1 switches it off")
