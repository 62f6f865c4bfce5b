"""The grouped products of the backward pass whose rows are those of tokens: gradients of activations and of inputs.

The activations are computed again from the saved product, where their gradient is: nothing else of the forward pass is
needed. Rows of tokens are gathered where they are loaded.
Shape letters: T tokens, H hidden size, E experts, K experts per token, I expert width, N = T·K rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expert_order import ExpertOrder
from .triton_blocks import load_block, multiply, place_of_program
from .triton_tiles import Tile


@triton.jit(do_not_specialize=["num_tiles"])
def _activation_gradient(
    gradient,
    gradient_stride,
    rows,
    tiles,
    num_tiles,
    down,
    weight_stride,
    weights,
    product,
    product_gradient,
    weighted,
    parts,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    expert, first, end, column = place_of_program(tiles, num_tiles, COLUMN_TILES)
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    assignment = tl.load(rows + tl.minimum(row, end - 1))
    left = gradient + (assignment // K).to(tl.int64) * gradient_stride
    right = down + expert.to(tl.int64) * weight_stride + columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = multiply(left, right, columns < I, total, I, H, BLOCK_K, I % BLOCK_N == 0)

    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + assignment).to(tl.float32)[:, None]
    # In two halves: the operands of all columns would not fit into the registers.
    halves = total.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    part = tl.zeros((BLOCK_M,), tl.float32)
    for half in tl.static_range(2):
        columns = column * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        part += through_activation(halves[half], weight, row, columns, end, product, product_gradient, weighted, I)
    if parts is not None:
        tl.store(parts + row.to(tl.int64) * COLUMN_TILES + column, part, mask=row < end)


@triton.jit
def through_activation(gradient, weight, row, columns, end, product, product_gradient, weighted, I: tl.constexpr):  # noqa: E741
    """Store what comes of the unweighted gradient of activations; return its products with them, summed by row."""
    inside = (row < end)[:, None] & (columns < I)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * I) + columns[None, :]
    gate = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(product + at + I, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # Rounded as in the forward pass.
    activation = (silu * up).to(product.dtype.element_ty).to(tl.float32)
    part = tl.sum(gradient * activation, axis=1)
    if weighted is not None:
        value = (weight * activation).to(weighted.dtype.element_ty)
        tl.store(weighted + row.to(tl.int64)[:, None] * I + columns[None, :], value, mask=inside)
    if product_gradient is not None:
        gradient *= weight
        of_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(product_gradient + at, of_gate.to(product_gradient.dtype.element_ty), mask=inside)
        tl.store(product_gradient + at + I, (gradient * silu).to(product_gradient.dtype.element_ty), mask=inside)
    return part


def activation_gradient(
    gradient: Tensor,
    order: ExpertOrder,
    tiles: Tensor,
    down: Tensor,
    top_k_weights: Tensor | None,
    top_k: int,
    product: Tensor,
    rows: int,
    tile: Tile,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Multiply the gradient of the output with `down` and go back through the activation.

    Args:
        gradient: `(T, H)`, rows of neighbouring elements.
        top_k_weights: `(T, K)`, contiguous; `None` where every row weighs 1.
        product: `(N, 2I)` of the forward pass.
        wanted: which of the results are to be computed.

    Returns:
        the gradient of the product, `(N, 2I)`; the activations times their weights, `(N, I)`; and the scalar products
        of the output's gradient and the unweighted output, `(N, tiles of columns)` float32, in parts to be summed.
    """
    num_rows, width = len(product), product.shape[1] // 2
    column_tiles = triton.cdiv(width, tile.columns)
    product_gradient = torch.empty_like(product) if wanted[0] else None
    weighted = product.new_empty(num_rows, width) if wanted[1] else None
    parts = product.new_empty(num_rows, column_tiles, dtype=torch.float32) if wanted[2] else None
    _activation_gradient[(len(tiles) * column_tiles,)](
        gradient,
        gradient.stride(0),
        order.rows,
        tiles,
        len(tiles),
        down,
        down.stride(0),
        top_k_weights,
        product,
        product_gradient,
        weighted,
        parts,
        H=down.shape[1],
        I=width,
        K=top_k,
        BLOCK_M=rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return product_gradient, weighted, parts


@triton.jit(do_not_specialize=["num_tiles"])
def _input_gradient(
    product_gradient,
    rows,
    tiles,
    num_tiles,
    gate,
    up,
    weight_stride,
    outputs,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TO_TOKENS: tl.constexpr,
):
    expert, first, end, column = place_of_program(tiles, num_tiles, tl.cdiv(H, BLOCK_N))
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = product_gradient + tl.minimum(row, end - 1).to(tl.int64)[:, None] * (2 * I) + depth[None, :]
    gate += expert.to(tl.int64) * weight_stride
    up += expert.to(tl.int64) * weight_stride
    right = columns[None, :] + depth[:, None] * H
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    STEPS: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    # One loop over both halves, or the pipeline would run dry between them.
    for step in range(0, 2 * STEPS):
        half = step // STEPS
        start = (step - half * STEPS) * BLOCK_K
        weight = tl.where(half == 0, gate, up)
        inside = depth < I - start
        left_block = load_block(left + (half * I + start), inside[None, :], I % BLOCK_K == 0)
        right_block = load_block(
            weight + start * H + right,
            inside[:, None] & (columns < H)[None, :],
            I % BLOCK_K == 0 and H % BLOCK_N == 0,
        )
        total = tl.dot(left_block, right_block, total, input_precision="ieee")

    inside = row < end
    if TO_TOKENS:
        row = tl.load(rows + row, mask=inside, other=0)
    at = row.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(outputs + at, total.to(outputs.dtype.element_ty), mask=inside[:, None] & (columns < H)[None, :])


def input_gradient(
    product_gradient: Tensor,
    order: ExpertOrder,
    tiles: Tensor,
    gate: Tensor,
    up: Tensor,
    rows: int,
    tile: Tile,
    to_tokens: bool,
) -> Tensor:
    """Return the gradients of the experts' inputs, `(N, H)`, row by row.

    With `to_tokens` each row goes to its token, whose only one it is; tokens of no expert get zeros.
    """
    width, hidden = gate.shape[1:]
    allocate = torch.zeros if to_tokens else torch.empty
    outputs = allocate(len(product_gradient), hidden, dtype=product_gradient.dtype, device=product_gradient.device)
    _input_gradient[(len(tiles) * triton.cdiv(hidden, tile.columns),)](
        product_gradient,
        order.rows,
        tiles,
        len(tiles),
        gate,
        up,
        gate.stride(0),
        outputs,
        H=hidden,
        I=width,
        BLOCK_M=rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        TO_TOKENS=to_tokens,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return outputs
