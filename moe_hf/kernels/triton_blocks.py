"""What the kernels of all grouped products share: where a program works, and how it multiplies."""

import triton
import triton.language as tl

# Programs that run side by side share their operands in the cache: columns of results within so many tiles of rows.
GROUP = tl.constexpr(8)


@triton.jit
def place_of_program(tiles, num_tiles, COLUMN_TILES: tl.constexpr):
    """Return the expert (-1: nothing to do), the first row, the end of the expert's rows, and the tile of columns."""
    program = tl.program_id(0)
    tile, column = tl.swizzle2d(program // COLUMN_TILES, program % COLUMN_TILES, num_tiles, COLUMN_TILES, GROUP)
    return tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2), column


@triton.jit
def load_block(pointers, inside, WHOLE: tl.constexpr):
    """Load a block, with zeros outside; the check is left out where the sizes make the block whole."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def multiply(
    left,
    right,
    inside,
    total,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
):
    """Return `total` (M, N) plus the product of M rows of length DEPTH with N columns.

    Args:
        left: (M,) pointers to the beginnings of rows, whose elements are neighbours.
        right: (N,) pointers to the beginnings of columns, whose elements lie STEP apart.
        inside: (N,) which columns there are; all of them with WHOLE_COLUMNS.
    """
    depth = tl.arange(0, BLOCK_K)
    left = left[:, None] + depth[None, :]
    right = right[None, :] + depth[:, None] * STEP
    WHOLE: tl.constexpr = DEPTH % BLOCK_K == 0
    for start in range(0, DEPTH, BLOCK_K):
        left_block = load_block(left + start, depth[None, :] < DEPTH - start, WHOLE)
        right_block = load_block(
            right + start * STEP, inside[None, :] & (depth[:, None] < DEPTH - start), WHOLE and WHOLE_COLUMNS
        )
        total = tl.dot(left_block, right_block, total, input_precision="ieee")
    return total
