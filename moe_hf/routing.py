"""Top-k routing of tokens to experts and the losses that shape it.

Shape letters: T tokens of one micro-batch on one rank, H hidden size, E experts, K experts per token, L sparse layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

# Sums an integer tensor over the data-parallel ranks; the identity when there is one.
StatisticsReducer = Callable[[torch.Tensor], torch.Tensor]


class RouterTap(nn.Module):
    """Identity through which a router's logits and choices pass, so that forward hooks can record them.

    A separate module because the router's own output is what the experts consume: the losses read from here, whether
    the router sits in a plain block or inside DeepSpeed's expert-parallel layer.
    """

    def forward(self, router_logits: torch.Tensor, top_k_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return router_logits, top_k_index


class MoERouter(nn.Module):
    """Choose K experts for every token and weigh their outputs.

    Scores are a softmax over all experts, taken before the top-k (Shazeer et al. 2017, arXiv 1701.06538, with the
    order used by Mixtral and Qwen3-MoE), or a sigmoid of each logit (DeepSeek-V3, arXiv 2412.19437, eq. 15). All
    arithmetic is float32: rounded logits unbalance training.

    With `router_balancing="loss_free"` there is a buffer `e_score_correction_bias` `(E,)`, added to the scores for the
    choice only (eq. 16). It stays float32 whatever the module is cast to: at 16 bits its small steps would be lost.

    Args:
        config (`MoEConfig`): reads `hidden_size`, `num_experts`, `num_experts_per_tok`, `norm_topk_prob`,
            `routed_scaling_factor`, `scoring_func`, `n_group`, `topk_group`, `group_scoring_func` and
            `router_balancing`.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.scoring_func = config.scoring_func
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.group_scoring_func = config.group_scoring_func
        has_bias = config.router_balancing == "loss_free"
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.tap = RouterTap()

    def forward(
        self, hidden_states: torch.Tensor, expert_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states: `(T, H)`.
            expert_bias: `(E,)`, added like the router's own bias to the scores for the choice only, never to the
                weights.

        Returns:
            `top_k_weights` `(T, K)` float32, `top_k_index` `(T, K)` int64 and `tokens_per_expert` `(E,)` int32: what
            DeepSpeed's expert-parallel layer unpacks from its router.
        """
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits = F.linear(hidden_states.float(), self.weight.float())
        scores = router_logits.softmax(dim=-1) if self.scoring_func == "softmax" else router_logits.sigmoid()
        top_k_index = self._choose(scores.detach(), expert_bias)
        # The scores are not recorded but recomputed by the losses: one (T, E) tensor less is kept per layer.
        _, top_k_index = self.tap(router_logits, top_k_index)
        top_k_weights = scores.gather(-1, top_k_index)
        if self.norm_topk_prob:
            # Biases can choose experts whose scores all underflow to 0.
            top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
        top_k_weights = top_k_weights * self.routed_scaling_factor
        return top_k_weights, top_k_index, count_assignments(top_k_index, self.num_experts).int()

    def _choose(self, scores: torch.Tensor, expert_bias: torch.Tensor | None) -> torch.Tensor:
        for bias in (self.e_score_correction_bias, expert_bias):
            scores = scores if bias is None else scores + bias
        if self.topk_group < self.n_group:
            scores = keep_best_groups(scores, self.n_group, self.topk_group, self.group_scoring_func)
        return scores.topk(self.top_k, dim=-1).indices

    def _apply(self, fn, recurse: bool = True):
        bias = self.e_score_correction_bias

        def keep_bias_in_float32(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if tensor is not bias or applied.dtype == bias.dtype else bias.to(applied.device)

        return super()._apply(keep_bias_in_float32, recurse)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


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


def count_assignments(
    top_k_index: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Count how many of the `(T, K)` assignments go to each expert, without waiting for the device.

    Args:
        top_k_index: `(T, K)` int64.
        num_experts: E.
        token_mask: `(T,)` bool, `False` for tokens that do not count (padding).

    Returns:
        `(E,)` int64.
    """
    counts = torch.zeros(num_experts, dtype=torch.int64, device=top_k_index.device)
    ones = torch.ones_like(top_k_index) if token_mask is None else token_mask[:, None].expand_as(top_k_index).long()
    return counts.scatter_add_(0, top_k_index.reshape(-1), ones.reshape(-1))


def count_layer_assignments(
    router_indices: tuple[torch.Tensor, ...], num_experts: int, token_mask: torch.Tensor
) -> torch.Tensor:
    """Count the assignments of every sparse layer: `(L, E)` int64, on the device of `token_mask`."""
    device = token_mask.device
    return torch.stack([count_assignments(index.to(device), num_experts, token_mask) for index in router_indices])


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
    perfect balance costs 1 whatever K is. Only `P_i` carries a gradient. Sigmoid scores become probabilities by
    dividing each token's by their sum (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    Args:
        router_logits: `(T, E)` float32, of this rank's tokens.
        tokens_per_expert: `(E,)`, assignments over which the load is counted (one rank's, or all ranks').
        token_mask: `(T,)` bool.
        num_tokens: what the summed probabilities are divided by, in tokens.
        scoring_func: `"softmax"` or `"sigmoid"`.

    Returns:
        Scalar float32.
    """
    num_experts = router_logits.shape[-1]
    load = tokens_per_expert.float() / tokens_per_expert.sum().clamp(min=1)
    # sigmoid(x_i) / sum_j sigmoid(x_j), also where all of them underflow.
    logits = router_logits if scoring_func == "softmax" else F.logsigmoid(router_logits)
    summed_probs = (logits.softmax(dim=-1) * token_mask[:, None]).sum(dim=0)
    return num_experts * (load * summed_probs).sum() / num_tokens


def router_z_loss(
    *, router_logits: torch.Tensor, token_mask: torch.Tensor, num_tokens: torch.Tensor | float
) -> torch.Tensor:
    """Router z-loss of one layer: the mean of `logsumexp(logits)**2` (ST-MoE, arXiv 2202.08906, eq. 5).

    Arguments as in `load_balancing_loss`. Returns a float32 scalar.
    """
    return (router_logits.logsumexp(dim=-1).square() * token_mask).sum() / num_tokens


class RouterLosses(NamedTuple):
    """Unweighted losses of every sparse layer, each `(L,)` float32."""

    aux: torch.Tensor
    z: torch.Tensor


def router_losses(
    router_logits: tuple[torch.Tensor, ...],
    router_indices: tuple[torch.Tensor, ...],
    token_mask: torch.Tensor,
    *,
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
        router_indices: L tensors `(T, K)`, the experts that were really chosen.
        token_mask: `(T,)` bool, `False` on padding.
        num_tokens_in_batch: unmasked tokens of the whole batch.
        reduce_statistics: sums over data-parallel ranks. One call for all layers together.
        scoring_func: of the router, `"softmax"` or `"sigmoid"`.
    """
    device = router_logits[0].device
    token_mask = token_mask.to(device)
    counts = count_layer_assignments(router_indices, router_logits[0].shape[-1], token_mask)
    num_tokens, num_ranks = token_mask.sum(), 1
    if reduce_statistics is not None:
        rank_and_tokens = torch.stack([torch.ones_like(num_tokens), num_tokens])
        reduced = reduce_statistics(torch.cat([counts.flatten(), rank_and_tokens]))
        counts = reduced[:-2].view_as(counts)
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
