"""What is made of a router's logits and choices: counts, balancing loss, z-loss, statistics. Pure functions of tensors.

Shape letters: B sequences of S tokens, T = B * S, E experts, K experts per token, L sparse layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Sums an integer tensor over the data-parallel ranks; the identity when there is one.
StatisticsReducer = Callable[[torch.Tensor], torch.Tensor]


def count_by_sequence(top_k_index: torch.Tensor, num_experts: int, token_mask: torch.Tensor) -> torch.Tensor:
    """Count each sequence's assignments to every expert, without waiting for the device.

    Args:
        top_k_index: `(T, K)` int64; E stands for no expert.
        num_experts: E.
        token_mask: `(B, S)` bool, `False` for tokens that do not count (padding).

    Returns:
        `(B, E)` int64.
    """
    batch_size = len(token_mask)
    index = top_k_index.reshape(batch_size, -1)
    counted = token_mask.unsqueeze(-1).expand(-1, -1, top_k_index.shape[-1]).reshape(batch_size, -1).long()
    counts = torch.zeros(batch_size, num_experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(1, index, counted)[:, :-1]


def count_layers(router_indices: tuple[torch.Tensor, ...], num_experts: int, token_mask: torch.Tensor) -> torch.Tensor:
    """Count the assignments of every sparse layer: `(L, B, E)` int64, on the device of `token_mask`."""
    device = token_mask.device
    return torch.stack([count_by_sequence(index.to(device), num_experts, token_mask) for index in router_indices])


def probabilities(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Return each token's distribution over the experts, `(T, E)`, whose rows sum to 1.

    Sigmoid scores become one by dividing each token's by their sum (DeepSeek-V3, arXiv 2412.19437, eq. 19), in a form
    that holds also where all of them underflow.
    """
    return (router_logits if scoring_func == "softmax" else F.logsigmoid(router_logits)).softmax(dim=-1)


def load_balancing_loss(
    *,
    router_logits: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    token_mask: torch.Tensor,
    num_tokens: torch.Tensor | float,
    scoring_func: str = "softmax",
) -> torch.Tensor:
    r"""Load-balancing loss of one layer: `E * sum_i f_i * P_i` (Switch Transformers, arXiv 2101.03961, eq. 4-6).

    `f_i` is expert i's share of all assignments and `P_i` the mean probability that the router gives it, so that
    perfect balance costs 1 whatever K is. Only `P_i` carries a gradient. With the counts of each sequence by itself it
    is the mean of the sequences' own losses, each weighted by its tokens (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    Args:
        router_logits: `(T, E)` float32, of this rank's tokens.
        tokens_per_expert: `(E,)`, assignments over which the load is counted (one rank's, or all ranks'), or `(B, E)`.
        token_mask: `(B, S)` bool.
        num_tokens: what the summed probabilities are divided by, in tokens.
        scoring_func: `"softmax"` or `"sigmoid"`.

    Returns:
        Scalar float32.
    """
    num_experts = router_logits.shape[-1]
    load = tokens_per_expert.float() / tokens_per_expert.sum(dim=-1, keepdim=True).clamp(min=1)
    probs = probabilities(router_logits, scoring_func).view(*token_mask.shape, num_experts)
    summed_probs = (probs * token_mask.unsqueeze(-1)).sum(dim=1)
    return num_experts * (load * summed_probs).sum() / num_tokens


def router_z_loss(
    *, router_logits: torch.Tensor, token_mask: torch.Tensor, num_tokens: torch.Tensor | float
) -> torch.Tensor:
    """Router z-loss of one layer: the mean of `logsumexp(logits)**2` (ST-MoE, arXiv 2202.08906, eq. 5).

    Arguments as in `load_balancing_loss`. Returns a float32 scalar.
    """
    return (router_logits.logsumexp(dim=-1).square() * token_mask.reshape(-1)).sum() / num_tokens


class RouterLosses(NamedTuple):
    """Unweighted losses of every sparse layer, each `(L,)` float32."""

    aux: torch.Tensor
    z: torch.Tensor


def router_losses(
    router_logits: tuple[torch.Tensor, ...],
    tokens_per_expert: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    scope: str = "global",
    num_tokens_in_batch: torch.Tensor | float | None = None,
    reduce_statistics: StatisticsReducer | None = None,
    scoring_func: str = "softmax",
) -> RouterLosses:
    """Compute both router losses of every sparse layer, never pooled over layers.

    Two ways of counting tokens, mirroring `num_items_in_batch` of the cross-entropy:

    - With `num_tokens_in_batch` (all ranks, all accumulation steps) the result is this micro-batch's additive share:
      summed over ranks and steps it is the loss of the whole batch.
    - Without it the result is a mean, such that the mean over ranks is the loss of all ranks' tokens.

    Args:
        router_logits: L tensors `(T, E)`.
        tokens_per_expert: `(L, B, E)`, assignments of the experts that were really chosen (`count_layers`).
        token_mask: `(B, S)` bool, `False` on padding.
        scope: over which tokens the load is counted: `"global"`, those of all ranks; `"local"`, of this rank;
            `"sequence"`, of each sequence by itself.
        num_tokens_in_batch: unmasked tokens of the whole batch.
        reduce_statistics: sums over data-parallel ranks. One call for all layers together, or none where nothing of
            other ranks is needed.
        scoring_func: of the router, `"softmax"` or `"sigmoid"`.
    """
    device = tokens_per_expert.device
    counts = tokens_per_expert if scope == "sequence" else tokens_per_expert.sum(dim=1)
    num_tokens, num_ranks = token_mask.sum(), 1
    needs_other_ranks = scope == "global" or (scope == "sequence" and num_tokens_in_batch is None)
    if reduce_statistics is not None and needs_other_ranks:
        rank_and_tokens = torch.stack([torch.ones_like(num_tokens), num_tokens])
        summed = counts.flatten() if scope == "global" else counts.new_empty(0)
        reduced = reduce_statistics(torch.cat([summed, rank_and_tokens]))
        counts = reduced[:-2].view_as(counts) if scope == "global" else counts
        num_ranks, num_tokens = reduced[-2], reduced[-1]
    if num_tokens_in_batch is None:
        num_tokens_in_batch = num_tokens.clamp(min=1) / num_ranks
    aux = [
        load_balancing_loss(
            router_logits=logits.to(device),
            tokens_per_expert=c,
            token_mask=token_mask,
            num_tokens=num_tokens_in_batch,
            scoring_func=scoring_func,
        )
        for logits, c in zip(router_logits, counts, strict=True)
    ]
    z = [
        router_z_loss(router_logits=logits.to(device), token_mask=token_mask, num_tokens=num_tokens_in_batch)
        for logits in router_logits
    ]
    return RouterLosses(torch.stack(aux), torch.stack(z))


class RouterStatistics(NamedTuple):
    """What one forward pass tells of its routers besides their losses, each `(L, B)` float32."""

    entropy: torch.Tensor
    logit_max: torch.Tensor


@torch.no_grad()
def router_statistics(
    router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor, scoring_func: str = "softmax"
) -> RouterStatistics:
    """Describe every sparse layer's logits.

    Returns:
        For each sequence the entropies (nats) of the unmasked tokens' distributions, summed over these tokens, and the
        largest absolute logit among them.
    """
    entropies, largest = [], []
    for logits in router_logits:
        logits = logits.to(token_mask.device)
        entropy = torch.special.entr(probabilities(logits, scoring_func)).sum(dim=-1).view_as(token_mask)
        entropies.append((entropy * token_mask).sum(dim=1))
        largest.append((logits.abs().amax(dim=-1).view_as(token_mask) * token_mask).amax(dim=1))
    return RouterStatistics(torch.stack(entropies), torch.stack(largest))
