"""The order in which the experts of a layer work through their rows."""

from typing import NamedTuple

import torch


class ExpertOrder(NamedTuple):
    """Assignments `t * K + k` of tokens to experts, as rows sorted by expert.

    An assignment whose index is no expert of this rank comes last and is nobody's: Transformers' own expert
    parallelism marks those of other ranks so.

    Attributes:
        rows: `(N,)` int32, the assignment that each row computes; of equal experts in their own order.
        places: `(N,)` int32, the row of each assignment: the inverse of `rows`.
        ends: `(E,)` int32, where the rows of each expert end.
    """

    rows: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
