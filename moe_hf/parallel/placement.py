"""On which machines the ranks of an expert-parallel group are: tokens should not leave theirs to reach an expert."""

from __future__ import annotations

import logging
import os

from .deepspeed_config import Config, expert_parallel_size
from .processes import rank

logger = logging.getLogger(__name__)

# DeepSpeed's key for groups of ranks that are not neighbours.
_STRIDED_KEY = "use_data_before_expert_parallelism"


def processes_per_machine() -> int | None:
    """Return how many processes the launcher started on this machine; `None` when it does not tell."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's and accelerate's; deepspeed's
        if name in os.environ:
            return int(os.environ[name])
    return None


def expert_parallel_groups(world_size: int, ep_size: int, strided: bool = False) -> list[list[int]]:
    """Return the ranks of every expert-parallel group, as DeepSpeed makes them.

    Args:
        world_size: number of ranks, a multiple of `ep_size`.
        ep_size: ranks that share one set of experts.
        strided: whether neighbours hold the same experts instead of sharing one set.
    """
    num_groups = world_size // ep_size
    if strided:
        return [list(range(first, world_size, num_groups)) for first in range(num_groups)]
    return [list(range(first, first + ep_size)) for first in range(0, world_size, ep_size)]


def warn_of_groups_across_machines(config: Config, world_size: int) -> None:
    """Say on rank 0 when tokens have to travel between machines to their experts, which is slow but not wrong.

    Args:
        config: the DeepSpeed JSON, with expert parallelism that fits the world size.
        world_size: number of ranks, as many on each machine.
    """
    local, ep_size = processes_per_machine(), expert_parallel_size(config)
    if local is None or rank() != 0:
        return
    strided = config.get(_STRIDED_KEY, False)
    groups = expert_parallel_groups(world_size, ep_size, strided)
    if all(group[0] // local == group[-1] // local for group in groups):
        return
    fitting = [size for size in range(1, local + 1) if local % size == 0 and ep_size % size == 0]
    remedy = f"delete {_STRIDED_KEY}" if strided and ep_size in fitting else f"{fitting[-1]} would stay within one"
    logger.warning(
        "expert_parallel_size=%d with %d processes on each machine: tokens travel between machines to their experts; "
        "%s.",
        ep_size,
        local,
        remedy,
    )
