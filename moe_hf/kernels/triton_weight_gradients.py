"""Gradients of weights: for each expert the product of two operands over its rows, one of them gathered from tokens."""

import triton
import triton.language as tl
from torch import Tensor

from .expert_order import ExpertOrder
from .triton_blocks import GROUP, load_block
from .triton_tiles import Tile


@triton.jit
def _weight_gradient(
    left,
    left_stride,
    right,
    right_stride,
    rows,
    ends,
    output,
    output_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    expert = program // (ROW_TILES * COLUMN_TILES)
    tile = program % (ROW_TILES * COLUMN_TILES)
    m, n = tl.swizzle2d(tile // COLUMN_TILES, tile % COLUMN_TILES, ROW_TILES, COLUMN_TILES, GROUP)
    m = m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        inside = row < end
        token = tl.load(rows + tl.minimum(row, end - 1)) // K
        # Behind the end the gathered operand is the token of the last row, the other one is zero.
        if GATHER_LEFT:
            left_row, right_row = token.to(tl.int64), row.to(tl.int64)
        else:
            left_row, right_row = row.to(tl.int64), token.to(tl.int64)
        left_block = load_block(
            left + left_row[None, :] * left_stride + m[:, None],
            (m < M)[:, None] & inside[None, :],
            GATHER_LEFT and M % BLOCK_M == 0,
        )
        right_block = load_block(
            right + right_row[:, None] * right_stride + n[None, :],
            (n < N)[None, :] & inside[:, None],
            (not GATHER_LEFT) and N % BLOCK_N == 0,
        )
        total = tl.dot(left_block, right_block, total, input_precision="ieee")
    at = expert.to(tl.int64) * output_stride + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def weight_gradient(
    left: Tensor,
    right: Tensor,
    order: ExpertOrder,
    output: Tensor,
    top_k: int,
    rows: int,
    tile: Tile,
    gather_left: bool,
) -> None:
    """Write for each expert the sum over its rows of the outer products of `left` and `right`; zeros without rows.

    Args:
        left: `(N, left size)` by row, or with `gather_left` `(T, left size)` by token.
        right: the other way round, `(T, right size)` by token, or `(N, right size)` by row.
        output: `(E, left size, right size)`, contiguous.
    """
    num_experts, left_size, right_size = output.shape
    grid = (num_experts * triton.cdiv(left_size, rows) * triton.cdiv(right_size, tile.columns),)
    _weight_gradient[grid](
        left,
        left.stride(0),
        right,
        right.stride(0),
        order.rows,
        order.ends,
        output,
        output.stride(0),
        M=left_size,
        N=right_size,
        K=top_k,
        GATHER_LEFT=gather_left,
        BLOCK_M=rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.num_warps,
        # A step begins with the indices of its rows. Triton gives half of the stages to their loads.
        num_stages=2 * tile.num_stages - 1,
    )
