"""Sums over the experts of each token: what they put out, what their inputs' gradients are, and tiles of dot products.

Rows are gathered and summed in float32 in registers, in the order of the experts' choice: always the same numbers, and
no float32 copy of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expert_order import ExpertOrder

_MOST_COLUMNS = 2048
_BLOCK = 128


@triton.jit
def _sum_rows(
    values, places, ends, weights, sums, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends + E - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k)
        there = tl.where(place < end, H, 0)
        value = tl.load(values + place.to(tl.int64) * H + columns, mask=columns < there, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * K + k).to(tl.float32)
        total += value
    tl.store(sums + token * H + columns, total.to(sums.dtype.element_ty), mask=columns < H)


def sum_over_experts(values: Tensor, order: ExpertOrder, top_k: int, top_k_weights: Tensor | None = None) -> Tensor:
    """Return the sums `(T, H)` of each token's K rows of `values`, `(N, H)`, times their weights where those are given.

    Rows of no expert, behind `order.ends[-1]`, are not looked at.
    """
    num_tokens, hidden = len(values) // top_k, values.shape[1]
    sums = values.new_empty(num_tokens, hidden)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(hidden))
    if num_tokens:
        _sum_rows[(num_tokens, triton.cdiv(hidden, block))](
            values,
            order.places,
            order.ends,
            top_k_weights,
            sums,
            H=hidden,
            E=order.ends.numel(),
            K=top_k,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def _sum_parts(
    parts, places, ends, sums, num_rows, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr
):
    assignment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, SIDE)
    place = tl.load(places + assignment, mask=assignment < num_rows, other=num_rows)
    inside = (place < tl.load(ends + E - 1))[:, None] & (part < PARTS)[None, :]
    values = tl.load(parts + place.to(tl.int64)[:, None] * PARTS + part[None, :], mask=inside, other=0.0)
    tl.store(sums + assignment, tl.sum(values, axis=1).to(sums.dtype.element_ty), mask=assignment < num_rows)


def sum_parts(parts: Tensor, order: ExpertOrder, dtype: torch.dtype) -> Tensor:
    """Return the sums `(N,)`, by assignment, of the parts `(N, parts)` float32 of each row; zero without expert."""
    num_rows, num_parts = parts.shape
    sums = torch.empty(num_rows, dtype=dtype, device=parts.device)
    if num_rows:
        _sum_parts[(triton.cdiv(num_rows, _BLOCK),)](
            parts,
            order.places,
            order.ends,
            sums,
            num_rows,
            E=order.ends.numel(),
            PARTS=num_parts,
            BLOCK=_BLOCK,
            SIDE=triton.next_power_of_2(num_parts),
        )
    return sums


@triton.jit
def _dot_with_rows(
    tokens, stride, rows, places, ends, products, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    assignment = tl.program_id(0).to(tl.int64)
    place = tl.load(places + assignment)
    there = tl.where(place < tl.load(ends + E - 1), H, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        token = tl.load(tokens + assignment // K * stride + columns, mask=columns < there, other=0.0)
        row = tl.load(rows + place.to(tl.int64) * H + columns, mask=columns < there, other=0.0)
        total += token.to(tl.float32) * row.to(tl.float32)
    tl.store(products + assignment, tl.sum(total, axis=0))


def dot_with_rows(tokens: Tensor, rows: Tensor, order: ExpertOrder) -> Tensor:
    """Return the scalar products `(T, K)` float32 of each token, `(T, H)`, with each of its rows, of `(N, H)`."""
    num_tokens, hidden = tokens.shape
    top_k = len(rows) // max(num_tokens, 1)
    products = torch.empty(num_tokens, top_k, dtype=torch.float32, device=rows.device)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(hidden))
    if len(rows):
        _dot_with_rows[(len(rows),)](
            tokens,
            tokens.stride(0),
            rows,
            order.places,
            order.ends,
            products,
            H=hidden,
            E=order.ends.numel(),
            K=top_k,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return products
