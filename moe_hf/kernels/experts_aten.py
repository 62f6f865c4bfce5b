"""The experts in ATen calls that write in place: what runs on a CPU, and what the Triton kernels are measured against.

Experts are worked through in blocks of neighbours with some hundred rows together, whose rows are gathered into buffers
that stay in the cache: products are an expert's, everything else a block's, so that many small experts do not cost many
small calls.

Shape letters: T tokens, H hidden size, E experts, K experts per token, I expert width, N = T * K rows, B rows and e
experts of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .expert_order import ExpertOrder

# Rows of a block unless one expert has more: with fewer, calls cost time, and more gain nothing but need memory.
_MAX_ROWS = 512


class _Block(NamedTuple):
    """Neighbouring experts and their rows.

    Attributes:
        experts: which ones.
        where: their rows.
        tokens: `(B,)`, whose rows they are.
        counts: the rows of each expert.
    """

    experts: slice
    where: slice
    tokens: torch.Tensor
    counts: list[int]


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
    blocks = _blocks(order, len(x))
    longest = max(len(block.tokens) for block in blocks)
    inputs, activations = x.new_empty(longest, x.shape[1]), x.new_empty(longest, width)
    scratch = None if keeps_product else x.new_empty(longest, 2 * width)
    for experts, where, tokens, counts in blocks:
        size = len(tokens)
        gathered = torch.index_select(x, 0, tokens, out=inputs[:size])
        part = product[where] if keeps_product else scratch[:size]
        for weight, of_weight in zip(gate_up, _parts(part, gate_up), strict=True):
            _multiply_each(gathered, weight[experts].mT, counts, out=of_weight)
        gate, up = part.chunk(2, dim=1)
        activated = torch.ops.aten.silu.out(gate, out=activations[:size]).mul_(up)
        _multiply_each(activated, down[experts].mT, counts, out=outputs[where])
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
    blocks = _blocks(order, len(x))
    longest = max(len(block.tokens) for block in blocks)
    grads, inputs = x.new_empty(longest, hidden), x.new_empty(longest, hidden)
    silus, activations, by_activation = (x.new_empty(longest, width) for _ in range(3))
    by_product = x.new_empty(longest, 2 * width)
    # An expert without rows too: the product of no rows writes zeros.
    for experts, where, tokens, counts in blocks:
        size = len(tokens)
        gate, up = product[where].chunk(2, dim=1)
        by_part = by_product[:size]
        to_gate, to_up = by_part.chunk(2, dim=1)
        gathered = torch.index_select(grad, 0, tokens, out=grads[:size])
        delta = by_activation[:size]
        _multiply_each(gathered, down[experts], counts, out=delta)
        silu = torch.ops.aten.silu.out(gate, out=silus[:size])
        activated = torch.mul(silu, up, out=activations[:size])
        if needs_weights:
            torch.mul(delta, activated, out=to_gate)
            torch.sum(to_gate, dim=1, keepdim=True, dtype=row_sums.dtype, out=row_sums[where])
        if weights is not None:
            delta.mul_(weights[where])
            activated.mul_(weights[where])
        if needs_down:
            _multiply_transposed_each(gathered, activated, counts, out=grad_down[experts])
        torch.mul(delta, silu, out=to_up)
        torch.ops.aten.silu_backward.grad_input(delta.mul_(up), gate, grad_input=to_gate)
        if needs_gate_up:
            seen = torch.index_select(x, 0, tokens, out=inputs[:size])
            for part, out in zip(_parts(by_part, gate_up), grad_gate_up, strict=True):
                _multiply_transposed_each(part, seen, counts, out=out[experts])
        if needs_x:
            x_rows_of_block = x_rows[where]
            for index, (part, weight) in enumerate(zip(_parts(by_part, gate_up), gate_up, strict=True)):
                _multiply_each(part, weight[experts], counts, out=x_rows_of_block, adds=index > 0)
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


def _blocks(order: ExpertOrder, num_tokens: int) -> list[_Block]:
    """Cut the experts into blocks of at most `_MAX_ROWS` rows, or of one expert."""
    top_k = len(order.rows) // max(num_tokens, 1)
    tokens = order.rows // top_k if top_k > 1 else order.rows
    ends = order.ends.tolist()
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    firsts, size = [0], 0
    for expert, count in enumerate(counts):
        if size + count > _MAX_ROWS and expert > firsts[-1]:
            firsts.append(expert)
            size = 0
        size += count
    blocks = []
    for first, last in zip(firsts, [*firsts[1:], len(counts)], strict=True):
        where = slice(ends[first] - counts[first], ends[last - 1])
        blocks.append(_Block(slice(first, last), where, tokens[where], counts[first:last]))
    return blocks


def _multiply_each(
    rows: torch.Tensor, weights: torch.Tensor, counts: list[int], *, out: torch.Tensor, adds: bool = False
) -> None:
    """Write the products of every expert's rows with its weight, `(B, n)` and `(e, n, m)` to `(B, m)`, or add them."""
    each = zip(rows.split_with_sizes(counts), weights.unbind(), out.split_with_sizes(counts), strict=True)
    for of_expert, weight, target in each:
        if adds:
            target.addmm_(of_expert, weight)
        else:
            torch.mm(of_expert, weight, out=target)


def _multiply_transposed_each(left: torch.Tensor, right: torch.Tensor, counts: list[int], *, out: torch.Tensor) -> None:
    """Write the products of an expert's transposed rows and its other rows, `(B, n)` and `(B, m)` to `(e, n, m)`."""
    each = zip(left.split_with_sizes(counts), right.split_with_sizes(counts), out.unbind(), strict=True)
    for rows, others, target in each:
        torch.mm(rows.t(), others, out=target)


def _float32_or_more(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_row(top_k_weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return the weight of each row, `(N, 1)`."""
    return top_k_weights.reshape(-1)[order.rows].unsqueeze(1)


def _parts(product: torch.Tensor, gate_up: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Cut columns as the weights are: all, or gate's and up's."""
    return product.chunk(len(gate_up), dim=1)
