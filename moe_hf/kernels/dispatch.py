"""Rows on their way to experts of other ranks and back, each gathered once in either direction.

Shape letters: T tokens, H hidden size, K experts per token, N = T * K rows.
"""

import torch

from .backends import backend_of
from .expert_order import ExpertOrder


def gather_rows(hidden_states: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return every row's token, `(T, H)` to `(N, H)`; backward, a token's gradient is summed in float32."""
    return _GatherRows.apply(hidden_states, *order)


def sum_rows(rows: torch.Tensor, top_k_weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return each token's weighted sum of its rows, `(N, H)` to `(T, H)`, in float32 before it is rounded.

    Args:
        rows: `(N, H)`, kept for the backward pass.
        top_k_weights: `(T, K)`.
        order: whose rows are whose.
    """
    return _SumRows.apply(rows, top_k_weights, *order)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, *order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*order)
        ctx.num_tokens = len(hidden_states)
        return backend_of(hidden_states).gather_rows(hidden_states, None, ExpertOrder(*order))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        order = ExpertOrder(*ctx.saved_tensors)
        return backend_of(grad).sum_rows(grad.contiguous(), None, order, ctx.num_tokens), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, top_k_weights: torch.Tensor, *order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, top_k_weights, *order)
        return backend_of(rows).sum_rows(rows, top_k_weights, ExpertOrder(*order), len(top_k_weights))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        rows, top_k_weights, *order = ctx.saved_tensors
        order, backend = ExpertOrder(*order), backend_of(grad)
        grad = grad.contiguous()
        by_rows = backend.gather_rows(grad, top_k_weights, order) if ctx.needs_input_grad[0] else None
        by_weights = backend.dot_rows(grad, rows, order).to(top_k_weights.dtype) if ctx.needs_input_grad[1] else None
        return by_rows, by_weights, None, None, None
