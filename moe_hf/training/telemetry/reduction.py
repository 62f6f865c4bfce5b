"""Sums and maxima over all ranks in one message."""

from math import prod

import numpy as np
import torch
import torch.distributed as dist

Named = dict[str, torch.Tensor]


def reduce_over_ranks(sums: Named, maxima: Named) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the sums and the maxima over all ranks, by one all-reduce and one transfer to the host.

    A sum that each rank gives a slot of its own is a gather, so the maxima need no second message.

    Args:
        sums: tensors of any shape and dtype on one device; the same names and shapes on every rank.
        maxima: likewise, for the largest value; a NaN of any rank is the maximum.

    Returns:
        Both as float64 arrays of the shapes given: integers below 2**53 are exact.
    """
    is_parallel = dist.is_initialized() and dist.get_world_size() > 1
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if is_parallel else (1, 0)
    # Not all accelerators have float64; those that work in parallel do.
    device = next(iter(sums.values())).device if is_parallel else "cpu"
    own = _flatten(maxima, device)
    slots = own.new_zeros(num_ranks, own.numel())
    slots[rank] = own
    vector = torch.cat([_flatten(sums, device), slots.flatten()])
    if is_parallel:
        dist.all_reduce(vector)
    values = vector.cpu().numpy()
    of_ranks = values[values.size - slots.numel() :].reshape(num_ranks, -1)
    return _unflatten(values, sums), _unflatten(of_ranks.max(axis=0), maxima)


def _flatten(tensors: Named, device: torch.device | str) -> torch.Tensor:
    flat = [tensor.detach().to(device).double().flatten() for tensor in tensors.values()]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=device)


def _unflatten(values: np.ndarray, like: Named) -> dict[str, np.ndarray]:
    arrays, start = {}, 0
    for name, tensor in like.items():
        end = start + prod(tensor.shape)
        arrays[name] = values[start:end].reshape(tensor.shape)
        start = end
    return arrays
