"""How fast, and whether rightly, the processes exchange tensors: measured by all of them together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

# 16 MB, of which an all-to-all sends a part to everyone.
_NUM_ELEMENTS = 4 * 2**20
_REPETITIONS = 3


def measure_exchange(device: torch.device) -> dict[str, dict[str, float | bool]]:
    """Time an all-reduce and an all-to-all over all processes, and look at what has arrived (a collective call).

    Bandwidths are those of the links, as `nccl-tests` defines `busbw`: with n processes that exchange b bytes in t
    seconds, 2 (n - 1) / n · b / t for an all-reduce and (n - 1) / n · b / t for an all-to-all.

    Args:
        device: of this process.

    Returns:
        For `"all_reduce"` and `"all_to_all"` {`seconds`, `bytes`, `gigabytes_per_second`, `right` (whether every
        process has got what it should)}.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    count = _NUM_ELEMENTS // size * size

    def reduce() -> torch.Tensor:
        summed = torch.full((count,), float(rank + 1), device=device)
        dist.all_reduce(summed)
        return summed

    sent = torch.arange(size, device=device, dtype=torch.float32).add_(rank * size).repeat_interleave(count // size)

    def exchange() -> torch.Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received

    whose = torch.arange(size, device=device, dtype=torch.float32).mul_(size).add_(rank)
    cases = {
        "all_reduce": (reduce, torch.full((count,), size * (size + 1) / 2, device=device), 2 * (size - 1) / size),
        "all_to_all": (exchange, whose.repeat_interleave(count // size), (size - 1) / size),
    }
    return {name: _measured(*case) for name, case in cases.items()}


def _measured(collective: Callable[[], torch.Tensor], expected: torch.Tensor, share: float) -> dict:
    wrong = (collective() != expected).any().long()  # and warms up
    dist.all_reduce(wrong)
    times = []
    for _ in range(_REPETITIONS):
        dist.barrier()
        start = time.perf_counter()
        collective()
        if expected.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    seconds, num_bytes = statistics.median(times), expected.numel() * expected.element_size()
    return {
        "seconds": seconds,
        "bytes": num_bytes,
        "gigabytes_per_second": share * num_bytes / seconds / 1e9,
        "right": wrong.item() == 0,
    }
