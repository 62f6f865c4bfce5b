"""The experts in ATen calls that write in place: what runs on a CPU, and what the Triton kernels are measured against.

Rows are gathered expert by expert into a buffer that stays in the cache, never for the whole layer.

Shape letters: T tokens, H hidden size, E experts, K experts per token, I expert width, N = T * K rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .expert_order import ExpertOrder


class _Rows(NamedTuple):
    """The rows of one expert."""

    expert: int
    where: slice
    tokens: torch.Tensor


def sort_by_expert(top_k_index: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort the assignments `(T, K)` by expert."""
    experts, rows = torch.sort(top_k_index.reshape(-1), stable=True)
    every_row = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    places = torch.empty_like(every_row).scatter_(0, rows, every_row)
    every_expert = torch.arange(num_experts, device=rows.device, dtype=experts.dtype)
    return ExpertOrder(rows.int(), places, torch.searchsorted(experts, every_expert, right=True, out_int32=True))


def forward(
    x: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    order: ExpertOrder,
    gate_up: list[torch.Tensor],
    down: torch.Tensor,
    *,
    keeps_product: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute every row's expert, and each token's weighted sum.

    Args:
        x: `(T, H)`.
        top_k_weights: `(T, K)`; `None` where every row weighs 1.
        order: as `sort_by_expert` returns it.
        gate_up: one packed weight `(E, 2I, H)`, gate first, or gate and up apart, `(E, I, H)` each.
        down: `(E, H, I)`.
        keeps_product: return what `backward` needs; otherwise an empty tensor.

    Returns:
        The sums `(T, H)`, and the products with gate and up `(N, 2I)`.
    """
    width, num_rows = down.shape[2], len(order.rows)
    product = x.new_empty(num_rows if keeps_product else 0, 2 * width)
    outputs = x.new_empty(num_rows, x.shape[1])
    experts = _rows_of_experts(order, len(x))
    longest = max(len(rows.tokens) for rows in experts)
    inputs, activations = x.new_empty(longest, x.shape[1]), x.new_empty(longest, width)
    scratch = None if keeps_product else x.new_empty(longest, 2 * width)
    for expert, where, tokens in experts:
        count = len(tokens)
        gathered = torch.index_select(x, 0, tokens, out=inputs[:count])
        part = product[where] if keeps_product else scratch[:count]
        _multiply(gathered, [weight[expert].t() for weight in gate_up], out=part)
        gate, up = part.split(width, dim=1)
        activated = torch.ops.aten.silu.out(gate, out=activations[:count]).mul_(up)
        torch.mm(activated, down[expert].t(), out=outputs[where])
    return sum_rows(outputs, top_k_weights, order, len(x)), product


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    product: torch.Tensor,
    order: ExpertOrder,
    gate_up: list[torch.Tensor],
    down: torch.Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor] | None, torch.Tensor | None]:
    """Return the gradients by `x`, `top_k_weights`, `gate_up` and `down`, those that `needs` asks for.

    The activations are computed again from `product`, and a weight's gradient is the product of a row's activations
    with their own gradient: neither activations nor outputs are kept.
    """
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    width, hidden = down.shape[2], x.shape[1]
    weights = None if top_k_weights is None else _by_row(top_k_weights, order)
    x_rows = x.new_empty(len(order.rows), hidden) if needs_x else None
    row_sums = x.new_zeros(len(order.rows), 1, dtype=_float32_or_more(x)) if needs_weights else None
    grad_gate_up = [weight.new_empty(weight.shape) for weight in gate_up] if needs_gate_up else None
    grad_down = down.new_empty(down.shape) if needs_down else None
    experts = _rows_of_experts(order, len(x))
    longest = max(len(rows.tokens) for rows in experts)
    grads, inputs = x.new_empty(longest, hidden), x.new_empty(longest, hidden)
    silus, activations, by_activation = (x.new_empty(longest, width) for _ in range(3))
    by_product = x.new_empty(longest, 2 * width)
    # An expert without rows too: the product of no rows writes zeros.
    for expert, where, tokens in experts:
        count = len(tokens)
        gate, up = product[where].split(width, dim=1)
        to_gate, to_up = by_product[:count].split(width, dim=1)
        gathered = torch.index_select(grad, 0, tokens, out=grads[:count])
        delta = torch.mm(gathered, down[expert], out=by_activation[:count])
        silu = torch.ops.aten.silu.out(gate, out=silus[:count])
        activated = torch.mul(silu, up, out=activations[:count])
        if needs_weights:
            torch.mul(delta, activated, out=to_gate)
            torch.sum(to_gate, dim=1, keepdim=True, dtype=row_sums.dtype, out=row_sums[where])
        if weights is not None:
            delta.mul_(weights[where])
            activated.mul_(weights[where])
        if needs_down:
            torch.mm(gathered.t(), activated, out=grad_down[expert])
        torch.mul(delta, silu, out=to_up)
        torch.ops.aten.silu_backward.grad_input(delta.mul_(up), gate, grad_input=to_gate)
        if needs_gate_up:
            seen = torch.index_select(x, 0, tokens, out=inputs[:count])
            for part, out in zip(_parts(by_product[:count], gate_up), grad_gate_up, strict=True):
                torch.mm(part.t(), seen, out=out[expert])
        if needs_x:
            _sum_products(_parts(by_product[:count], gate_up), [w[expert] for w in gate_up], out=x_rows[where])
    return (
        sum_rows(x_rows, None, order, len(x)) if needs_x else None,
        row_sums[order.places].view_as(top_k_weights).to(top_k_weights.dtype) if needs_weights else None,
        grad_gate_up,
        grad_down,
    )


def gather_rows(x: torch.Tensor, top_k_weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """Return every row's token, `(T, H)` to `(N, H)`, times its weight where there are weights `(T, K)`."""
    top_k = len(order.rows) // max(len(x), 1)
    rows = x[order.rows // top_k if top_k > 1 else order.rows]
    return rows if top_k_weights is None else rows.mul_(_by_row(top_k_weights, order))


def sum_rows(
    rows: torch.Tensor, top_k_weights: torch.Tensor | None, order: ExpertOrder, num_tokens: int
) -> torch.Tensor:
    """Sum each token's rows, `(N, H)` to `(T, H)`, in float32 whatever they are; rows that are nobody's add nothing."""
    rows[int(order.ends[-1]) :].zero_()
    if top_k_weights is None and len(rows) == num_tokens:
        return rows[order.places]
    places = order.places.view(num_tokens, len(rows) // num_tokens)
    if top_k_weights is None:
        return F.embedding_bag(places, rows, mode="sum")
    if rows.dtype == _float32_or_more(rows):
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=top_k_weights.to(rows.dtype))
    # A bag would round the weights to 16 bits.
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=torch.float32)
    for of_rank, weights in zip(places.unbind(1), top_k_weights.split(1, dim=1), strict=True):
        total.addcmul_(rows[of_rank], weights)
    return total.to(rows.dtype)


def dot_rows(x: torch.Tensor, rows: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return the scalar product of each token with each of its rows, `(T, H)` and `(N, H)` to `(T, K)` float32."""
    rows = rows[order.places].view(len(x), len(rows) // max(len(x), 1), x.shape[1])
    return (rows * x.unsqueeze(1)).sum(dim=-1, dtype=_float32_or_more(x))


def _rows_of_experts(order: ExpertOrder, num_tokens: int) -> list[_Rows]:
    top_k = len(order.rows) // max(num_tokens, 1)
    tokens = order.rows // top_k if top_k > 1 else order.rows
    ends = order.ends.tolist()
    borders = zip([0, *ends[:-1]], ends, strict=True)
    return [_Rows(expert, slice(*border), tokens[slice(*border)]) for expert, border in enumerate(borders)]


def _float32_or_more(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_row(top_k_weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return the weight of each row, `(N, 1)`."""
    return top_k_weights.reshape(-1)[order.rows].unsqueeze(1)


def _multiply(x: torch.Tensor, weights: list[torch.Tensor], *, out: torch.Tensor) -> None:
    """Write the products of `x` with every weight side by side."""
    if len(weights) == 1:
        torch.mm(x, weights[0], out=out)
        return
    for weight, part in zip(weights, out.chunk(len(weights), dim=1), strict=True):
        torch.mm(x, weight, out=part)


def _parts(product: torch.Tensor, gate_up: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Cut columns as the weights are: all, or gate's and up's."""
    return product.chunk(len(gate_up), dim=1)


def _sum_products(parts: tuple[torch.Tensor, ...], weights: list[torch.Tensor], *, out: torch.Tensor) -> None:
    torch.mm(parts[0], weights[0], out=out)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out.addmm_(part, weight)
