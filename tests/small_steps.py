"""A small model for the benchmarks of whole steps, and what its reference finds."""

import torch

from benchmarks.cases import StepCase
from benchmarks.step_equality import Expected, make_tokens, make_weights

CASE = StepCase("small", 32, 8, 2, 24, 2, 4, 2, 96, batch=2, sequence_length=24)


def prepare(case: StepCase) -> tuple[dict[str, torch.Tensor], torch.Tensor, Expected]:
    """Return the weights, the tokens of a step, and what the reference finds with them."""
    tokens, weights = make_tokens(case, "cpu"), make_weights(case, "cpu")
    return weights, tokens, Expected(case, weights, tokens)
