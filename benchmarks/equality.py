"""The gate before any timing: a peer that computes something else is not compared."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .cases import DTYPES, TOLERANCES, LayerCase
from .inputs import LayerInputs
from .peers.base import Layer


class Different(Exception):
    """Results are not those of the reference; the message says which, by how much."""


def relative_error(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Return `norm(found - expected) / norm(expected)` in float64; infinity where something is missing or NaN."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    error = float((found.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def reference_results(case: LayerCase, inputs: LayerInputs) -> dict[str, torch.Tensor]:
    """Compute a layer's output and all gradients in float64, one expert at a time.

    Returns:
        `output` and `hidden_states` `(T, H)`, and the gradients `router`, `gate_up` and `down`.
    """
    tokens = inputs.hidden_states.double().requires_grad_()
    weights = {name: weight.double().requires_grad_() for name, weight in inputs.weights.items()}
    top_k_weights, top_k_index = F.linear(tokens, weights["router"]).softmax(dim=-1).topk(case.top_k)
    top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
    output = torch.zeros_like(tokens)
    # unbind, not indexing: its backward fills one gradient instead of one for every expert.
    experts = zip(weights["gate_up"].unbind(0), weights["down"].unbind(0), strict=True)
    for expert, (gate_up, down) in enumerate(experts):
        token, slot = torch.where(top_k_index == expert)
        gate, up = F.linear(tokens[token], gate_up).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down) * top_k_weights[token, slot, None]
        output = output.index_add(0, token, rows)
    output.backward(inputs.output_gradient.double())
    gradients = {name: weight.grad for name, weight in weights.items()}
    return {"output": output.detach(), "hidden_states": tokens.grad} | gradients


def check_layer(
    layer: Layer, case: LayerCase, inputs: LayerInputs, expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the relative errors of a layer's output and gradients by name, the largest of two passes.

    The first pass finds NaN in the memory that it gets; in the second one PyTorch fills what nobody has written.

    Raises:
        Different: one of them is larger than the precision allows.
    """
    dtype = DTYPES[case.dtype]
    poison(inputs.hidden_states.device, dtype, case.rows * 2 * case.width * dtype.itemsize)
    errors = _errors(layer, inputs, expected)
    with filling_uninitialized_memory():
        again = _errors(layer, inputs, expected)
    return refuse_large({name: max(error, again[name]) for name, error in errors.items()}, TOLERANCES[case.dtype])


def refuse_large(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    """Return the errors.

    Raises:
        Different: one of them is larger than the tolerance.
    """
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise Different(f"relative error of {found} is above {tolerance:.0e}")
    return errors


def _errors(layer: Layer, inputs: LayerInputs, expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    layer.clear_gradients()
    tokens = inputs.hidden_states.clone().requires_grad_()
    output = layer.forward(tokens)
    output.backward(inputs.output_gradient)
    found = {"output": output.detach(), "hidden_states": tokens.grad} | layer.gradients()
    errors = {name: relative_error(found.get(name), value) for name, value in expected.items()}
    layer.clear_gradients()
    return errors


def poison(device: torch.device, dtype: torch.dtype, most_bytes: int) -> None:
    """Leave NaN in freed memory, in blocks of many sizes, for whoever allocates next and reads before it writes.

    Args:
        device: whose memory.
        dtype: of what is computed.
        most_bytes: of the largest thing that is.
    """
    blocks = []
    for bits in range(8, most_bytes.bit_length() + 1):
        blocks.append(torch.full((2**bits // dtype.itemsize,), float("nan"), dtype=dtype, device=device))
    del blocks


@contextmanager
def filling_uninitialized_memory() -> Iterator[None]:
    """Let PyTorch fill new tensors with NaN, which it does in its deterministic mode only."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
