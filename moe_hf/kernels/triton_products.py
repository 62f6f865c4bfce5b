"""The grouped products of the forward pass: every tile of rows with the weights of its expert.

Rows of tokens are gathered where they are loaded; no copy of them is ever written.
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
def _gate_and_up(
    hidden_states,
    hidden_stride,
    rows,
    tiles,
    num_tiles,
    gate,
    up,
    weight_stride,
    product,
    activations,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, first, end, column = place_of_program(tiles, num_tiles, tl.cdiv(I, BLOCK_N))
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows behind the end compute the last row again and are not stored.
    token = tl.load(rows + tl.minimum(row, end - 1)) // K
    left = hidden_states + token.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    weight = expert.to(tl.int64) * weight_stride + columns[None, :] * H + depth[:, None]
    WHOLE: tl.constexpr = H % BLOCK_K == 0
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_K):
        left_block = load_block(left + start, depth[None, :] < H - start, WHOLE)
        inside = (columns < I)[None, :] & (depth[:, None] < H - start)
        gate_block = load_block(gate + weight + start, inside, WHOLE and I % BLOCK_N == 0)
        up_block = load_block(up + weight + start, inside, WHOLE and I % BLOCK_N == 0)
        gates = tl.dot(left_block, gate_block, gates, input_precision="ieee")
        ups = tl.dot(left_block, up_block, ups, input_precision="ieee")

    # Activations come from the rounded product, as in the backward pass, which has nothing else.
    gates = gates.to(activations.dtype.element_ty)
    ups = ups.to(activations.dtype.element_ty)
    inside = (row < end)[:, None] & (columns < I)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * I) + columns[None, :]
    if product is not None:
        tl.store(product + at, gates, mask=inside)
        tl.store(product + at + I, ups, mask=inside)
    gates = gates.to(tl.float32)
    value = gates * tl.sigmoid(gates) * ups.to(tl.float32)
    at = row.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(activations + at, value.to(activations.dtype.element_ty), mask=inside)


def multiply_gate_and_up(
    hidden_states: Tensor,
    order: ExpertOrder,
    tiles: Tensor,
    gate: Tensor,
    up: Tensor,
    top_k: int,
    rows: int,
    tile: Tile,
    keeps_product: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the product with gate and up, `(N, 2I)`, and the activations silu(gate)·up, `(N, I)`.

    Args:
        hidden_states: `(T, H)`, rows of neighbouring elements.
        tiles: of `cut_into_tiles`, with at most `rows` rows.
        gate: `(E, I, H)`, as is `up`: two tensors, or both halves of one.
        keeps_product: otherwise the product returned has no rows.
    """
    width, hidden = gate.shape[1:]
    product = hidden_states.new_empty(order.rows.numel() if keeps_product else 0, 2 * width)
    activations = hidden_states.new_empty(order.rows.numel(), width)
    grid = (len(tiles) * triton.cdiv(width, tile.columns),)
    _gate_and_up[grid](
        hidden_states,
        hidden_states.stride(0),
        order.rows,
        tiles,
        len(tiles),
        gate,
        up,
        gate.stride(0),
        product if keeps_product else None,
        activations,
        H=hidden,
        I=width,
        K=top_k,
        BLOCK_M=rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return product, activations


@triton.jit(do_not_specialize=["num_tiles"])
def _down(
    activations,
    rows,
    tiles,
    num_tiles,
    down,
    weight_stride,
    weights,
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
    left = activations + tl.minimum(row, end - 1).to(tl.int64) * I
    right = down + expert.to(tl.int64) * weight_stride + columns * I
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = multiply(left, right, columns < H, total, 1, I, BLOCK_K, H % BLOCK_N == 0)

    inside = row < end
    if TO_TOKENS:
        row = tl.load(rows + row, mask=inside, other=0)
        if weights is not None:
            total *= tl.load(weights + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(outputs + at, total.to(outputs.dtype.element_ty), mask=inside[:, None] & (columns < H)[None, :])


def multiply_down(
    activations: Tensor,
    order: ExpertOrder,
    tiles: Tensor,
    down: Tensor,
    rows: int,
    tile: Tile,
    to_tokens: bool = False,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """Return the outputs of the experts, `(N, H)`, row by row.

    With `to_tokens` each row is multiplied by its weight, of `(T, 1)`, if there are any, and goes to its token, whose
    only one it is: what is returned is the sum over experts. Tokens of no expert get zeros.
    """
    hidden, width = down.shape[1:]
    allocate = torch.zeros if to_tokens else torch.empty
    outputs = allocate(len(activations), hidden, dtype=activations.dtype, device=activations.device)
    grid = (len(tiles) * triton.cdiv(hidden, tile.columns),)
    _down[grid](
        activations,
        order.rows,
        tiles,
        len(tiles),
        down,
        down.stride(0),
        top_k_weights,
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
