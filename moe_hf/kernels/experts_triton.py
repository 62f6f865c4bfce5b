"""The experts on CUDA: sorting, forward and backward passes in Triton, without ever waiting for the device.

Two products forward, gate and up in one, and five backward. Between them lie one activation, its gradient and the rows
that each token sums. The same inputs always give the same numbers.
Shape letters: T tokens, H hidden size, E experts, K experts per token, I expert width, N = T·K rows.
"""

import torch
from torch import Tensor

from .expert_order import ExpertOrder
from .triton_combine import dot_with_rows, sum_over_experts, sum_parts
from .triton_gather import gather_tokens
from .triton_gradients import activation_gradient, input_gradient
from .triton_order import cut_into_tiles
from .triton_order import sort_by_expert as _sort_by_expert
from .triton_products import multiply_down, multiply_gate_and_up
from .triton_tiles import Tiles, tiles_for
from .triton_weight_gradients import weight_gradient


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> ExpertOrder:
    """Sort the assignments `(T, K)` int64 by expert; an index outside of 0 … E - 1 belongs to none."""
    with torch.cuda.device_of(top_k_index):
        return _sort_by_expert(top_k_index, num_experts)


def forward(
    hidden_states: Tensor,
    top_k_weights: Tensor | None,
    order: ExpertOrder,
    gate_up: list[Tensor],
    down: Tensor,
    *,
    keeps_product: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of each token's experts, and the product with gate and up for the backward pass.

    Args:
        hidden_states: `(T, H)`.
        top_k_weights: `(T, K)`; `None` where every row weighs 1.
        order: of `sort_by_expert`.
        gate_up: `[(E, 2I, H)]`, gate first, or `[(E, I, H), (E, I, H)]`.
        down: `(E, H, I)`.
        keeps_product: return what `backward` needs; otherwise an empty tensor.

    Returns:
        the output `(T, H)` and the product `(N, 2I)`, in which rows of no expert are left as they are.
    """
    gate, up = _halves(gate_up)
    hidden_states, down = _with_near_columns(hidden_states), down.contiguous()
    weights, top_k = _contiguous(top_k_weights), _top_k(hidden_states, order)
    sizes = _sizes(hidden_states, order, down)
    with torch.cuda.device_of(hidden_states):
        tiles = cut_into_tiles(order, sizes.rows)
        product, activations = multiply_gate_and_up(
            hidden_states, order, tiles, gate, up, top_k, sizes.rows, sizes.gate_up, keeps_product
        )
        if top_k == 1:
            outputs = multiply_down(activations, order, tiles, down, sizes.rows, sizes.down, True, weights)
            return outputs, product
        outputs = multiply_down(activations, order, tiles, down, sizes.rows, sizes.down)
        return sum_over_experts(outputs, order, top_k, weights), product


def backward(
    gradient: Tensor,
    hidden_states: Tensor,
    top_k_weights: Tensor | None,
    product: Tensor,
    order: ExpertOrder,
    gate_up: list[Tensor],
    down: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None, Tensor | None]:
    """Compute the gradients of hidden states, weights, `gate_up` and `down`, those of them that are needed.

    Args:
        gradient: `(T, H)`, of the output.
        product: what `forward` returned, `(N, 2I)`; the rest is what it was given.
    """
    for_hidden, for_weights, for_gate_up, for_down = needs
    if not any(needs):
        return None, None, None, None
    gradient, hidden_states = _with_near_columns(gradient), _with_near_columns(hidden_states)
    down, weights, top_k = down.contiguous(), _contiguous(top_k_weights), _top_k(hidden_states, order)
    sizes = _sizes(hidden_states, order, down)
    with torch.cuda.device_of(gradient):
        tiles = cut_into_tiles(order, sizes.rows)
        product_gradient, weighted, parts = activation_gradient(
            gradient,
            order,
            tiles,
            down,
            weights,
            top_k,
            product,
            sizes.rows,
            sizes.activation_gradient,
            wanted=(for_hidden or for_gate_up, for_down, for_weights),
        )
        d_weights = sum_parts(parts, order, weights.dtype).view_as(weights) if for_weights else None
        d_down = _down_gradient(gradient, weighted, order, down, top_k, sizes) if for_down else None
        del weighted
        d_gate_up = None
        if for_gate_up:
            d_gate_up = _gate_up_gradient(product_gradient, hidden_states, order, gate_up, top_k, sizes)
        d_hidden = None
        if for_hidden:
            gate, up = _halves(gate_up)
            d_hidden = input_gradient(
                product_gradient, order, tiles, gate, up, sizes.rows, sizes.input_gradient, to_tokens=top_k == 1
            )
            if top_k > 1:
                d_hidden = sum_over_experts(d_hidden, order, top_k)
        return d_hidden, d_weights, d_gate_up, d_down


def gather_rows(hidden_states: Tensor, top_k_weights: Tensor | None, order: ExpertOrder) -> Tensor:
    """Return every row's token, `(T, H)` to `(N, H)`, times its weight where there are weights `(T, K)`."""
    with torch.cuda.device_of(hidden_states):
        return gather_tokens(_with_near_columns(hidden_states), order, _contiguous(top_k_weights))


def sum_rows(rows: Tensor, top_k_weights: Tensor | None, order: ExpertOrder, num_tokens: int) -> Tensor:
    """Sum each token's rows, `(N, H)` to `(T, H)`, in float32; rows that are nobody's add nothing."""
    with torch.cuda.device_of(rows):
        return sum_over_experts(rows, order, len(rows) // max(num_tokens, 1), _contiguous(top_k_weights))


def dot_rows(hidden_states: Tensor, rows: Tensor, order: ExpertOrder) -> Tensor:
    """Return the scalar product of each token with each of its rows, `(T, H)` and `(N, H)` to `(T, K)` float32."""
    with torch.cuda.device_of(rows):
        return dot_with_rows(_with_near_columns(hidden_states), rows, order)


def _contiguous(top_k_weights: Tensor | None) -> Tensor | None:
    return None if top_k_weights is None else top_k_weights.contiguous()


def _top_k(hidden_states: Tensor, order: ExpertOrder) -> int:
    return max(1, len(order.rows) // max(1, len(hidden_states)))


def _down_gradient(
    gradient: Tensor, weighted: Tensor, order: ExpertOrder, down: Tensor, top_k: int, sizes: Tiles
) -> Tensor:
    output = torch.empty_like(down)
    weight_gradient(
        gradient, weighted, order, output, top_k, sizes.weight_rows, sizes.weight_gradient, gather_left=True
    )
    return output


def _gate_up_gradient(
    product_gradient: Tensor, hidden_states: Tensor, order: ExpertOrder, gate_up: list[Tensor], top_k: int, sizes: Tiles
) -> list[Tensor]:
    outputs = [torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for weight in gate_up]
    for output, columns in zip(outputs, product_gradient.chunk(len(outputs), dim=1), strict=True):
        weight_gradient(
            columns, hidden_states, order, output, top_k, sizes.weight_rows, sizes.weight_gradient, gather_left=False
        )
    return outputs


def _halves(gate_up: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weights of gate and up, `(E, I, H)` each, with the same strides."""
    weights = [weight.contiguous() for weight in gate_up]
    return tuple(weights) if len(weights) == 2 else weights[0].chunk(2, dim=1)


def _with_near_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _sizes(hidden_states: Tensor, order: ExpertOrder, down: Tensor) -> Tiles:
    num_experts, hidden, width = down.shape
    return tiles_for(hidden_states.dtype, hidden, width, len(order.rows) // num_experts, hidden_states.device)
