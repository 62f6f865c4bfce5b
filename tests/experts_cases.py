"""Inputs of an experts kernel, and what is right: the formula in float64, every expert on every token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Case(NamedTuple):
    """Shapes: T tokens, H hidden size, E experts, K experts per token, I expert width."""

    T: int
    H: int
    E: int
    K: int
    I: int  # noqa: E741
    routing: str = "uneven"
    packed: bool = True
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        extras = ["packed" if self.packed else "separate", *(["strided"] if self.strided else [])]
        sizes = f"T{self.T}-H{self.H}-E{self.E}-K{self.K}-I{self.I}"
        return "-".join([sizes, self.routing, *extras, str(self.dtype).removeprefix("torch.")])


class Inputs(NamedTuple):
    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    gate_up: torch.Tensor  # packed, whatever the layout of the case is
    down: torch.Tensor
    gradient: torch.Tensor


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Draw inputs on the CPU, always the same ones, and put them on the device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype).to(device)

    hidden_states, gradient = draw(case.T, case.H), draw(case.T, case.H)
    if case.strided:
        hidden_states, gradient = draw(case.H, case.T).T, draw(1, case.H).expand(case.T, case.H)
    return Inputs(
        hidden_states,
        _choose(case, generator).to(device),
        torch.rand(case.T, case.K, generator=generator).to(device),
        draw(case.E, 2 * case.I, case.H, scale=case.H**-0.5),
        draw(case.E, case.H, case.I, scale=case.I**-0.5),
        gradient,
    )


def _choose(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Choose K experts for each token, the first ones more often, and never the last but one."""
    scores = torch.rand(case.T, case.E, generator=generator) - torch.linspace(0, 0.6, case.E)
    if case.E > case.K:
        scores[:, -2] = -1
    index = scores.topk(case.K).indices
    if case.routing == "nobody":
        nobody = torch.rand(case.T, case.K, generator=generator) < 0.3
        index[nobody] = case.E
        index[:2] = case.E
    elif case.routing == "one":
        index[:] = 1  # also more than once for a token
    else:
        assert case.routing == "uneven"
    return index


def reference(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return output and gradients in float64: the sum over all experts, each of all tokens, times their weights."""
    floats = [inputs.hidden_states, inputs.top_k_weights, inputs.gate_up, inputs.down]
    hidden_states, weights, gate_up, down = leaves = [value.double().requires_grad_() for value in floats]
    output = torch.zeros(case.T, case.H, dtype=torch.float64, device=hidden_states.device)
    for expert in range(case.E):
        gate, up = F.linear(hidden_states, gate_up[expert]).chunk(2, dim=-1)
        weight = (weights * (inputs.top_k_index == expert)).sum(1, keepdim=True)
        output = output + weight * F.linear(F.silu(gate) * up, down[expert])
    gradients = torch.autograd.grad(output, leaves, inputs.gradient.double())
    return dict(zip(NAMES, [output.detach(), *gradients], strict=True))


NAMES = ("output", "hidden_states", "top_k_weights", "gate_up", "down")
ALL = (True, True, True, True)


def layout(case: Case, packed: torch.Tensor) -> list[torch.Tensor]:
    """Return the weights of gate and up as the kernel gets them: one tensor, or two."""
    return [packed] if case.packed else [half.contiguous() for half in packed.chunk(2, dim=1)]


def run(backend, case: Case, inputs: Inputs, needs: tuple[bool, ...] = ALL) -> dict[str, torch.Tensor | None]:
    """Return output and gradients of a backend, `gate_up` packed; None is what was not needed."""
    gate_up = layout(case, inputs.gate_up)
    hidden_states, index, weights, _, down, gradient = inputs
    order = backend.sort_by_expert(index, case.E)
    output, product = backend.forward(hidden_states, weights, order, gate_up, down)
    gradients = backend.backward(gradient, hidden_states, weights, product, order, gate_up, down, needs)
    of_gate_up = gradients[2]
    if of_gate_up is not None:
        assert [part.shape for part in of_gate_up] == [part.shape for part in gate_up]
        of_gate_up = torch.cat(of_gate_up, dim=1)
    return dict(zip(NAMES, [output, *gradients[:2], of_gate_up, gradients[3]], strict=True))


def relative_error(value: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference in units of the largest value; infinite when a number is missing."""
    if value.shape != right.shape:
        return float("inf")
    error = (value.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return error.nan_to_num(nan=float("inf")).item()


def check(backend, case: Case, inputs: Inputs, limit: float) -> None:
    """Compare a backend with the reference."""
    results, right = run(backend, case, inputs), reference(case, inputs)
    dtypes = dict(zip(NAMES, [case.dtype, case.dtype, inputs.top_k_weights.dtype, case.dtype, case.dtype], strict=True))
    assert {name: value.dtype for name, value in results.items()} == dtypes
    errors = {name: relative_error(value, right[name]) for name, value in results.items()}
    assert max(errors.values()) <= limit, errors
    idle = torch.tensor([expert for expert in range(case.E) if not (inputs.top_k_index == expert).any()], dtype=int)
    assert not results["gate_up"][idle].any() and not results["down"][idle].any(), "experts without rows have gradients"


def check_again(backend, case: Case, inputs: Inputs) -> None:
    """Compare a backend with itself, bit for bit."""
    results, again = run(backend, case, inputs), run(backend, case, inputs)
    assert all(torch.equal(value, again[name]) for name, value in results.items()), "a second run differs"
