"""The layout of the self-test: that of the run, where it has to be on fewer processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..parallel.deepspeed_config import (
    Config,
    expert_parallel_size,
    with_expert_parallel_size,
)
from ..parallel.parallel_sizes import parallel_sizes, with_parallel_sizes


@dataclass(frozen=True)
class Layout:
    """How many processes there are and what they share; `expert` 0 is AutoEP off."""

    ranks: int
    expert: int = 0
    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        """Processes that read different rows."""
        return self.ranks // (self.tensor * self.sequence * self.pipeline)

    def describe(self) -> str:
        """Return such as `4 processes, EP 2, PP 2`."""
        sizes = {"TP": self.tensor, "SP": self.sequence, "PP": self.pipeline}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return ", ".join(
            [f"{self.ranks} process{'es' if self.ranks > 1 else ''}", f"EP {self.expert or 'off'}", *named]
        )


def layout_of(config: Config, num_ranks: int) -> Layout:
    """Return the layout that a DeepSpeed JSON describes."""
    sizes = parallel_sizes(config)
    return Layout(num_ranks, expert_parallel_size(config), sizes.tensor, sizes.sequence, sizes.pipeline)


def with_layout(config: Config, layout: Layout) -> Config:
    """Return a copy of a DeepSpeed JSON in which the sizes are those of the layout."""
    config = with_expert_parallel_size(config, layout.expert)
    return with_parallel_sizes(config, tensor=layout.tensor, sequence=layout.sequence, pipeline=layout.pipeline)


def fewest_ranks(layout: Layout) -> int:
    """Return on how many processes the layout can be made small: every kind of parallelism in it has size 2."""
    shared = _halved(layout.tensor) * _halved(layout.pipeline)
    return shared * max(_halved(layout.sequence), _halved(layout.expert), _halved(layout.data))


def best_ranks(layout: Layout, at_most: int) -> int:
    """Return the number of processes for a self-test: all, or a multiple of the fewest that fits.

    Args:
        layout: of the run.
        at_most: processes that there is room for.
    """
    if layout.ranks <= at_most:
        return layout.ranks
    fewest = fewest_ranks(layout)
    # Twice as many show replicas of experts besides.
    has_replicas = layout.expert > 1 and layout.ranks // (layout.tensor * layout.pipeline) > layout.expert
    return 2 * fewest if has_replicas and 2 * fewest <= min(at_most, layout.ranks) else fewest


def shrunk(layout: Layout, num_ranks: int, num_experts: int) -> Layout:
    """Return a layout of the same kind on another number of processes.

    Args:
        layout: of the run.
        num_ranks: processes of the self-test; the layout itself when they are as many.
        num_experts: of each sparse layer, which expert parallelism has to divide.
    """
    if num_ranks == layout.ranks:
        return layout
    left, sizes = num_ranks, []
    for size in (layout.tensor, layout.pipeline, layout.sequence):
        sizes.append(2 if size > 1 and left % 2 == 0 else 1)
        left //= sizes[-1]
    tensor, pipeline, sequence = sizes
    sharing = num_ranks // (tensor * pipeline)
    had_replicas = layout.ranks // (layout.tensor * layout.pipeline) > layout.expert
    # Replicas of experts are part of the kind, where there are processes enough for both.
    room = sharing // 2 if had_replicas and sharing >= 4 else sharing
    expert = _largest_divisor(math.gcd(room, max(num_experts, 1)), layout.expert) if layout.expert else 0
    return Layout(num_ranks, expert, tensor, sequence, pipeline)


def _halved(size: int) -> int:
    return min(size, 2) or 1


def _largest_divisor(number: int, at_most: int) -> int:
    return next(size for size in range(min(number, max(at_most, 1)), 0, -1) if number % size == 0)
