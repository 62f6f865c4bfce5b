"""How much attention falls on the first token, which a head looks at when it has nothing to look for.

Measured from queries and keys, so with any attention implementation, and on a sample: one sequence, few queries.
Shape letters: B batch, S sequence, N sampled queries, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ...modeling_moe import MoEAttention, MoEForCausalLM

MAX_QUERIES = 64


class SampledQueries(NamedTuple):
    """Positions in one sequence that are looked at, what they see, and where their document begins.

    `positions` and `first` are `(N,)` int64, `visible` is `(N, S)` bool.
    """

    positions: torch.Tensor
    first: torch.Tensor
    visible: torch.Tensor


class AttentionSink:
    """Sums of the attention that queries pay to the first token, by decoder layer (Xiao et al. 2023, arXiv 2309.17453).

    In a packed row, where attention does not cross documents, the first token of a query is that of its own document.
    First tokens themselves, which can look nowhere else, and padding are no queries.

    Args:
        model: not wrapped.
    """

    def __init__(self, model: MoEForCausalLM) -> None:
        self._attentions = [module for module in model.modules() if isinstance(module, MoEAttention)]
        self._masses: list[torch.Tensor] = []
        self._num_weights = 0

    @contextmanager
    def measure(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Measure the first sequence of the one forward pass inside; recomputation comes later and is not seen.

        Args:
            input_ids: `(B, S)`, the batch of this pass, as the two others.
            attention_mask: `(B, S)`, 0 on padding.
            position_ids: `(B, S)`.
            whole: makes `(heads, S, D)` of the piece that this rank computes; then the batch given here is the whole
                one, and every rank with a piece measures the same.
        """
        mask, places = (None if x is None else x[0] for x in (attention_mask, position_ids))
        sampled = sample_queries(torch.ones_like(input_ids[0]) if mask is None else mask, mask is None, places)
        self._masses, self._num_weights = [], 0

        def record(attention: MoEAttention):
            def hook(tap, inputs, outputs) -> None:
                query, key = (x[0].detach() for x in inputs)
                if whole is not None:
                    query, key = whole(query), whole(key)
                # Under tensor parallelism these are not all heads of the model.
                self._num_weights = len(sampled.positions) * len(query)
                self._masses.append(first_token_mass(query, key, attention.scaling, sampled))

            return hook

        handles = [attention.tap.register_forward_hook(record(attention)) for attention in self._attentions]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pop(self) -> tuple[torch.Tensor, int] | None:
        """Return the mass of each decoder layer `(num_hidden_layers,)`, summed over so many queries and heads."""
        masses, self._masses = self._masses, []
        return (torch.stack(masses), self._num_weights) if masses else None


def sample_queries(mask: torch.Tensor, packed: bool, position_ids: torch.Tensor | None) -> SampledQueries:
    """Choose at most `MAX_QUERIES` evenly spaced queries of one sequence.

    Args:
        mask: `(S,)`, 0 on padding.
        packed: whether documents end where `position_ids` do not go on, as in the model without an attention mask.
        position_ids: `(S,)`.
    """
    index = torch.arange(len(mask), device=mask.device)
    begins = torch.zeros_like(index)
    if packed and position_ids is not None:
        begins[1:] = position_ids.diff() != 1
    documents = begins.cumsum(0)
    visible = (index[:, None] >= index) & (documents[:, None] == documents) & mask.bool()
    first = visible.int().argmax(dim=-1)
    candidates = torch.nonzero(mask.bool() & (first != index)).squeeze(-1)
    num_queries = min(len(candidates), MAX_QUERIES)
    positions = candidates[torch.arange(num_queries, device=mask.device) * len(candidates) // max(num_queries, 1)]
    return SampledQueries(positions, first[positions], visible[positions])


@torch.no_grad()
def first_token_mass(query: torch.Tensor, key: torch.Tensor, scaling: float, sampled: SampledQueries) -> torch.Tensor:
    """Return the attention that the sampled queries of all heads pay to their first token, summed, as a scalar.

    Args:
        query: `(heads, S, D)`, rotated.
        key: `(key heads, S, D)`, rotated; each serves as many consecutive query heads.
        scaling: of the scores.
        sampled: which queries.
    """
    mass = query.new_zeros((), dtype=torch.float32)
    # One key head after the other: scores of all heads of a long sequence would be a peak of memory.
    for queries, keys in zip(query.unflatten(0, (key.shape[0], -1)), key, strict=True):
        scores = queries[:, sampled.positions].float() @ keys.float().T * scaling
        scores = scores.masked_fill(~sampled.visible, float("-inf"))
        of_first = scores.gather(-1, sampled.first.expand(scores.shape[0], -1).unsqueeze(-1)).squeeze(-1)
        mass += (of_first - scores.logsumexp(dim=-1)).exp().sum()
    return mass
