"""The order in which rows of tokens go through the experts."""

from typing import NamedTuple

from torch import Tensor


class ExpertOrder(NamedTuple):
    """Assignments of tokens to experts, sorted by expert and otherwise left in their order.

    Of T tokens with K experts each, assignment t·K + k is the k-th expert of token t; each of the N = T·K assignments
    is one row. An index outside of 0 … E - 1 belongs to no expert: such rows come last, behind `ends[-1]`.

    Attributes:
        rows: `(N,)` int32, the assignment that each row computes.
        places: `(N,)` int32, the row of each assignment: the inverse permutation of `rows`.
        ends: `(E,)` int32, where the rows of each expert end; they begin where those of the expert before it end.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor
