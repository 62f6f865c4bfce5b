"""Sorts assignments by expert, and cuts each expert's rows into tiles, all on the device.

A stable counting sort: each block of assignments counts its experts, a prefix sum over experts and blocks says where
those of each end, and every assignment finds its place. No count ever comes to the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expert_order import ExpertOrder

_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _count(index, counts, places, num_rows, num_blocks, E: tl.constexpr, BLOCK: tl.constexpr):
    """Count each expert in a block, and for each assignment those after it that go to the same expert."""
    block = tl.program_id(0)
    mine = block * BLOCK + tl.arange(0, BLOCK)
    expert = expert_of(index, mine, num_rows, E)
    # Loaded again: one axis of a block cannot be turned into the other without a way through shared memory either.
    other = block * BLOCK + tl.arange(0, BLOCK)
    same = expert[:, None] == expert_of(index, other, num_rows, E)[None, :]
    after = same & (other[None, :] > mine[:, None])
    tl.store(places + mine, tl.sum(after.to(tl.int32), axis=1), mask=mine < num_rows)
    # All of one expert store the same number.
    tl.store(counts + expert * num_blocks + block, tl.sum(same.to(tl.int32), axis=1), mask=mine < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _place(index, ends_of_blocks, rows, places, num_rows, num_blocks, E: tl.constexpr, BLOCK: tl.constexpr):
    """Turn the number of those after an assignment, which `places` holds, into its place."""
    block = tl.program_id(0)
    mine = block * BLOCK + tl.arange(0, BLOCK)
    inside = mine < num_rows
    expert = expert_of(index, mine, num_rows, E)
    end = tl.load(ends_of_blocks + expert * num_blocks + block, mask=inside, other=0)
    place = end - 1 - tl.load(places + mine, mask=inside, other=0)
    tl.store(places + mine, place, mask=inside)
    tl.store(rows + place, mine, mask=inside)


@triton.jit
def expert_of(index, assignments, num_rows, E: tl.constexpr):
    """Load the experts of assignments: E where the index names none, -1 behind the last assignment."""
    inside = assignments < num_rows
    expert = tl.load(index + assignments, mask=inside, other=-1).to(tl.int32)
    return tl.where(inside & ((expert < 0) | (expert > E)), E, expert)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> ExpertOrder:
    """Sort the assignments `(T, K)` int64 by expert, stably and without waiting for the device."""
    index = top_k_index.contiguous()
    num_rows = index.numel()
    num_blocks = max(1, triton.cdiv(num_rows, _BLOCK))
    counts = torch.zeros(num_experts + 1, num_blocks, dtype=torch.int32, device=index.device)
    rows = torch.empty(num_rows, dtype=torch.int32, device=index.device)
    places = torch.empty_like(rows)
    if num_rows:
        _count[(num_blocks,)](index, counts, places, num_rows, num_blocks, E=num_experts, BLOCK=_BLOCK, num_warps=8)
    ends_of_blocks = counts.view(-1).cumsum(0, dtype=torch.int32)
    if num_rows:
        _place[(num_blocks,)](index, ends_of_blocks, rows, places, num_rows, num_blocks, E=num_experts, BLOCK=_BLOCK)
    ends = ends_of_blocks.view(num_experts + 1, num_blocks)[:-1, -1].contiguous()
    return ExpertOrder(rows, places, ends)


@triton.jit(do_not_specialize=["num_tiles"])
def _cut(ends, tiles, num_tiles, E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the tiles of one expert; the program after the last expert marks the tiles that are left over."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    to = tl.load(ends + every, mask=every < E, other=0)
    since = tl.load(ends + every - 1, mask=(every > 0) & (every < E), other=0)
    before = tl.sum(tl.where(every < expert, tl.cdiv(to - since, ROWS), 0))
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert, mask=expert < E, other=0)
    count = tl.where(expert < E, tl.cdiv(end - start, ROWS), num_tiles - before)
    for first in range(0, count, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        inside = tile < count
        at = tiles + (before + tile) * 3
        tl.store(at, tl.where(expert < E, expert, -1), mask=inside)
        tl.store(at + 1, start + tile * ROWS, mask=inside)
        tl.store(at + 2, end, mask=inside)


def cut_into_tiles(order: ExpertOrder, rows_per_tile: int) -> Tensor:
    """Return the tiles of at most so many rows that no two experts share.

    There are as many as there can be: every expert's last tile may be a short one. Tiles that are left over come last.

    Returns:
        `(tiles, 3)` int32: the expert, or -1; the first row; where the expert's rows end.
    """
    num_experts = order.ends.numel()
    num_tiles = triton.cdiv(order.rows.numel(), rows_per_tile) + num_experts
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=order.ends.device)
    _cut[(num_experts + 1,)](
        order.ends,
        tiles,
        num_tiles,
        E=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=rows_per_tile,
        BLOCK=_BLOCK,
        num_warps=1,
    )
    return tiles
