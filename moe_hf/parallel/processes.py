"""Which process this is, and how several of them agree on an error."""

import os

import torch.distributed as dist

from ..errors import UserError


def rank() -> int:
    """Rank of this process, also before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes the launcher started, also before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def raise_together(error: UserError | None) -> None:
    """Raise the error of the lowest rank that has one, on all ranks (a collective call).

    Args:
        error: what this rank met, or `None`.
    """
    errors = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met
