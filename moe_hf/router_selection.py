"""How experts are chosen beyond a plain top-k: groups, balanced assignment, capacity. Pure functions of tensors.

Shape letters: T tokens of one micro-batch on one rank, E experts, K experts per token.
"""

import math

import torch


def keep_best_groups(scores: torch.Tensor, num_groups: int, num_kept: int, group_scoring_func: str) -> torch.Tensor:
    """Leave each token the experts of its best groups (DeepSeek-V2, arXiv 2405.04434, sec. 2.2.2; V3, 2412.19437).

    Args:
        scores: `(T, E)`, with the biases that decide the choice; expert e is in group `e // (E / num_groups)`.
        num_groups: equal groups of consecutive experts.
        num_kept: groups that a token may choose from.
        group_scoring_func: what a group is worth: `"top2_sum"` or `"max"` of its scores.

    Returns:
        `(T, E)`: the scores, minus infinity outside the kept groups. Not 0: a biased score can be negative.
    """
    grouped = scores.unflatten(-1, (num_groups, -1))
    if group_scoring_func == "max":
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(num_kept, dim=-1, sorted=False).indices
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def sinkhorn(router_logits: torch.Tensor, num_iterations: int) -> torch.Tensor:
    r"""Scale `exp(logits)` until experts share the tokens equally.

    Columns and rows are normalised in turn (Sinkhorn & Knopp 1967; Cuturi 2013, arXiv 1306.0895), in logarithms, so
    that large logits do not overflow. What is approached is the plan closest to the router's wishes, in relative
    entropy, under which every token gives away a mass of 1 and every expert receives `T / E`. S-BASE assigns tokens by
    this plan (Clark et al. 2022, arXiv 2202.01169, sec. 3.1).

    Args:
        router_logits: `(T, E)`, of the tokens that are balanced together.
        num_iterations: a fixed number, so that no device has to report whether it has converged.

    Returns:
        `(T, E)`: the plan; its rows sum to 1, its columns to `T / E` as far as it has converged.
    """
    num_tokens, num_experts = router_logits.shape
    if num_tokens == 0:
        return router_logits
    log_plan, log_share = router_logits, math.log(num_tokens / num_experts)
    for _ in range(num_iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True) + log_share
        log_plan = log_plan.log_softmax(dim=1)
    return log_plan.exp()


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Return how many of T tokens an expert takes at most: `ceil(factor * T * K / E)`, as Switch and GShard count.

    At least 1, where there are tokens at all.
    """
    # 1.1 * 10 is a little more than 11 in floating point, and would be rounded up to 12.
    return max(min(1, num_tokens), math.ceil(capacity_factor * num_tokens * top_k / num_experts - 1e-6))


def drop_beyond_capacity(
    top_k_weights: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, capacity: int, policy: str
) -> torch.Tensor:
    """Say which assignments their experts have no room for, without waiting for the device.

    Args:
        top_k_weights: `(T, K)`.
        top_k_index: `(T, K)` int64.
        num_experts: E.
        capacity: assignments that an expert takes.
        policy: who comes first at an expert: `"position"`, all first choices in the order of the tokens, then all
            second choices, … (GShard, arXiv 2006.16668, algorithm 1); `"probability"`, the largest weights, and among
            equal ones that order.

    Returns:
        `(T, K)` bool, `True` where an assignment is dropped.
    """
    # One column after the other: the order of "position".
    experts, weights = top_k_index.t().reshape(-1), top_k_weights.t().reshape(-1)
    order = torch.arange(experts.numel(), device=experts.device)
    if policy == "probability":
        order = weights.sort(descending=True, stable=True).indices
    by_expert = experts[order].sort(stable=True)
    order = order[by_expert.indices]
    # The queue of expert e begins where those of the experts before it end.
    begin = torch.searchsorted(by_expert.values, torch.arange(num_experts, device=experts.device))
    place = torch.arange(experts.numel(), device=experts.device) - begin[by_expert.values]
    dropped = torch.empty_like(place, dtype=torch.bool).scatter_(0, order, place >= capacity)
    return dropped.view(top_k_index.shape[::-1]).t()
