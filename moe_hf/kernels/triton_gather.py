"""The rows of tokens, sorted by expert, on their way to other ranks.

Each token is read once, and written to its places: they are a permutation, so that every row is written once too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expert_order import ExpertOrder

_MOST_COLUMNS = 2048


@triton.jit
def _gather_rows(tokens, stride, places, weights, rows, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(tokens + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = value
        if weights is not None:
            row = value * tl.load(weights + token * K + k).to(tl.float32)
        place = tl.load(places + token * K + k).to(tl.int64)
        tl.store(rows + place * H + columns, row.to(rows.dtype.element_ty), mask=inside)


def gather_tokens(tokens: Tensor, order: ExpertOrder, top_k_weights: Tensor | None = None) -> Tensor:
    """Return the rows `(N, H)` of all assignments, times their weights, multiplied in float32, where those are given.

    Args:
        tokens: `(T, H)`, rows of neighbouring elements.
        order: whose rows are whose; those of no expert, behind `order.ends[-1]`, are gathered too.
        top_k_weights: `(T, K)`, contiguous.
    """
    num_tokens, hidden = tokens.shape
    num_rows = len(order.rows)
    rows = torch.empty(num_rows, hidden, dtype=tokens.dtype, device=tokens.device)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(hidden))
    if num_rows:
        _gather_rows[(num_tokens, triton.cdiv(hidden, block))](
            tokens,
            tokens.stride(0),
            order.places,
            top_k_weights,
            rows,
            H=hidden,
            K=num_rows // num_tokens,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return rows
