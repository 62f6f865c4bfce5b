"""The experts of a layer as one operation with a backward pass of its own, for Transformers' experts interface.

Importing registers it as `"moe_hf"`: `experts_implementation="moe_hf"` runs our own models and Mixtral, Qwen3-MoE,
OLMoE and the other models of Transformers whose experts are a SwiGLU of one packed weight.

Kept for the backward pass are the layer's input and the products with gate and up, `2d + 4KI` bytes a token in 16
bits whatever the number of experts (Guo et al. 2025, arXiv 2512.14080, sec. 3); activations are computed again, and
outputs of single experts are needed nowhere.

Shape letters: T tokens, H hidden size, E experts, K experts per token, I expert width, N = T * K rows.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from .backends import backend_of
from .expert_order import ExpertOrder

NAME = "moe_hf"


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, `(T, H)`, as Transformers' experts interface asks.

    Args:
        module: with `gate_up_proj` `(E, 2I, H)`, gate first, and `down_proj` `(E, H, I)`.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)`; an index of E or more belongs to no expert here.
        top_k_weights: `(T, K)`.

    Raises:
        ValueError: the module's experts are something else than such a SwiGLU.
    """
    _check_is_swiglu(module)
    order = sort_by_expert(top_k_index, module.num_experts)
    return run_experts(hidden_states, top_k_weights, order, [module.gate_up_proj], module.down_proj)


def sort_by_expert(top_k_index: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort the assignments `(T, K)` by expert, without waiting for the device."""
    return ExpertOrder(*_sort(top_k_index, num_experts))


def run_experts(
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    order: ExpertOrder,
    gate_up: list[torch.Tensor],
    down: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts.

    Args:
        hidden_states: `(T, H)`.
        top_k_weights: `(T, K)`; `None` where every row weighs 1.
        order: whose rows are whose.
        gate_up: one packed weight `(E, 2I, H)`, gate first, or gate and up apart, `(E, I, H)` each.
        down: `(E, H, I)`.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, down = hidden_states.to(dtype), down.to(dtype)
        gate_up = [weight.to(dtype) for weight in gate_up]
    if torch.is_grad_enabled():
        return _Experts.apply(hidden_states, top_k_weights, *order, down, *gate_up)
    return _experts(hidden_states, top_k_weights, *order, gate_up, down, False)[0]


def _check_is_swiglu(module: nn.Module) -> None:
    is_silu = isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"])))
    plain_gate = type(module)._apply_gate is _default_apply_gate
    lacks = [name for name in ("has_gate", "is_concatenated") if not getattr(module, name, True)]
    others = [name for name in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(module, name, False)]
    if not (is_silu and plain_gate) or lacks or others:
        raise ValueError(
            f'experts_implementation="{NAME}" computes SwiGLU experts without biases, packed as (E, 2I, H), and '
            f'{type(module).__name__} has others; use "grouped_mm".'
        )


@torch.library.custom_op("moe_hf::sort_by_expert", mutates_args=())
def _sort(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(backend_of(top_k_index).sort_by_expert(top_k_index, num_experts))


@_sort.register_fake
def _(top_k_index, num_experts):
    rows = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int32)
    return rows, torch.empty_like(rows), rows.new_empty(num_experts)


@torch.library.custom_op("moe_hf::experts", mutates_args=())
def _experts(
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    rows: torch.Tensor,
    places: torch.Tensor,
    ends: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: torch.Tensor,
    keeps_product: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    order, backend = ExpertOrder(rows, places, ends), backend_of(hidden_states)
    return backend.forward(hidden_states, top_k_weights, order, gate_up, down, keeps_product=keeps_product)


@_experts.register_fake
def _(hidden_states, top_k_weights, rows, places, ends, gate_up, down, keeps_product):
    num_rows = len(rows) if keeps_product else 0
    return torch.empty_like(hidden_states), hidden_states.new_empty(num_rows, 2 * down.shape[2])


@torch.library.custom_op("moe_hf::experts_backward", mutates_args=())
def _experts_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    product: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    ends: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: torch.Tensor,
    needs: list[bool],
) -> list[torch.Tensor]:
    order, backend = ExpertOrder(rows, places, ends), backend_of(grad)
    by_x, by_weights, by_gate_up, by_down = backend.backward(
        grad, hidden_states, top_k_weights, product, order, gate_up, down, tuple(needs)
    )
    return [g for g in (by_x, by_weights, *(by_gate_up or []), by_down) if g is not None]


@_experts_backward.register_fake
def _(grad, hidden_states, top_k_weights, product, rows, places, ends, gate_up, down, needs):
    wanted = zip(needs, ([hidden_states], [top_k_weights], gate_up, [down]), strict=True)
    return [tensor.new_empty(tensor.shape) for need, tensors in wanted if need for tensor in tensors]


class _Experts(torch.autograd.Function):
    """The operators with their gradients, which autograd may keep: from an operator's own they would be copied."""

    @staticmethod
    def forward(ctx, hidden_states, top_k_weights, rows, places, ends, down, *gate_up):
        output, product = _experts(hidden_states, top_k_weights, rows, places, ends, list(gate_up), down, True)
        ctx.save_for_backward(hidden_states, top_k_weights, product, rows, places, ends, down, *gate_up)
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        hidden_states, top_k_weights, product, rows, places, ends, down, *gate_up = ctx.saved_tensors
        needs_x, needs_weights, _, _, _, needs_down, *needs_gate_up = ctx.needs_input_grad
        needs = [needs_x, needs_weights, any(needs_gate_up), needs_down]
        order = rows, places, ends
        grads = _experts_backward(
            grad.contiguous(), hidden_states, top_k_weights, product, *order, gate_up, down, needs
        )
        by_x, by_weights = (grads.pop(0) if need else None for need in needs[:2])
        by_down = grads.pop() if needs_down else None
        return by_x, by_weights, None, None, None, by_down, *(grads or [None] * len(gate_up))


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
