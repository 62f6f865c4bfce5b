"""The routers: which experts a token visits, and with which weights.

Shape letters: T tokens of one micro-batch on one rank, H hidden size, E experts, K experts per token, C capacity.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .router_selection import drop_beyond_capacity, expert_capacity, keep_best_groups, sinkhorn


class RouterTap(nn.Module):
    """Identity through which a router's logits and choices pass, so that forward hooks can record them.

    A separate module because the router's own output is what the experts consume: the losses read from here, whether
    the router sits in a plain block or inside DeepSpeed's expert-parallel layer.
    """

    def forward(
        self, router_logits: torch.Tensor, top_k_index: torch.Tensor, dropped: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return router_logits, top_k_index, dropped


class _Logits(torch.autograd.Function):
    """Linear map in float32 of inputs and a weight in any dtype, which keeps them as they are for the backward pass.

    Autograd's own would keep the inputs in float32: more, in fine-grained layers, than all of the experts.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs.float(), weight.float())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight = ctx.needs_input_grad
        by_inputs = (gradient @ weight.float()).to(inputs.dtype) if for_inputs else None
        by_weight = (gradient.t() @ inputs.float()).to(weight.dtype) if for_weight else None
        return by_inputs, by_weight


class MoERouter(nn.Module):
    r"""Choose K experts for every token and weigh their outputs.

    Scores are a softmax over all experts (Shazeer et al. 2017, arXiv 1701.06538) or a sigmoid of each logit
    (DeepSeek-V3, arXiv 2412.19437, eq. 15). The K largest are chosen; their scores are the weights, divided by their
    sum with `norm_topk_prob`. With `topk_before_softmax` the softmax is taken over the K largest logits alone (Mixtral,
    arXiv 2401.04088, sec. 2.1): the same weights as with `norm_topk_prob`, up to rounding. All arithmetic is float32:
    rounded logits unbalance training.

    `router_balancing` may change the choice, never the weights:

    - `"loss_free"`: a buffer `e_score_correction_bias` `(E,)` is added to the scores (arXiv 2412.19437, eq. 16). It
      stays float32 whatever the module is cast to: at 16 bits its small steps would be lost.
    - `"sinkhorn"`: in training the K largest entries of the token's row in a balanced plan are taken (`sinkhorn`).

    In training an expert may have a capacity (`expert_capacity_factor`): assignments beyond it get the weight 0, so
    that the token is carried on by the residual alone, and keep their index, as expert parallelism needs.
    `router_jitter_noise` multiplies what the router sees, in training, by numbers drawn uniformly from
    `[1 - eps, 1 + eps]` (Switch Transformers, arXiv 2101.03961, sec. 2.2).

    Args:
        config (`MoEConfig`): its fields on scores, choice, balancing, noise and capacity.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
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
        router_logits = self.compute_logits(hidden_states)
        # Where the weights are not made of the scores, these need no gradient.
        scores = self.compute_scores(router_logits.detach() if self.config.topk_before_softmax else router_logits)
        top_k_index = self._choose(router_logits.detach(), scores.detach(), expert_bias)
        top_k_weights = self._weigh(router_logits, scores, top_k_index)
        dropped = self._drop(top_k_weights.detach(), top_k_index)
        # The scores are not recorded but recomputed by the losses: one (T, E) tensor less is kept per layer.
        self.tap(router_logits, top_k_index, dropped)
        if dropped is not None:
            top_k_weights = top_k_weights.masked_fill(dropped, 0.0)
        top_k_weights = top_k_weights * self.config.routed_scaling_factor
        return top_k_weights, top_k_index, count_assignments(top_k_index, self.num_experts).int()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits `(T, E)` in float32; in training the inputs `(T, H)` get the noise that is configured."""
        inputs, noise = hidden_states, self.config.router_jitter_noise
        if self.training and noise:
            inputs = inputs * torch.empty_like(inputs, dtype=torch.float32).uniform_(1 - noise, 1 + noise)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return _Logits.apply(inputs, self.weight)

    def compute_scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Return the scores `(T, E)` that the logits stand for."""
        return router_logits.softmax(dim=-1) if self.config.scoring_func == "softmax" else router_logits.sigmoid()

    def _choose(
        self, router_logits: torch.Tensor, scores: torch.Tensor, expert_bias: torch.Tensor | None
    ) -> torch.Tensor:
        config, ranking = self.config, scores
        if config.router_balancing == "sinkhorn" and self.training:
            ranking = sinkhorn(router_logits, config.sinkhorn_iterations)
        for bias in (self.e_score_correction_bias, expert_bias):
            ranking = ranking if bias is None else ranking + bias
        if config.topk_group < config.n_group:
            ranking = keep_best_groups(ranking, config.n_group, config.topk_group, config.group_scoring_func)
        if config.topk_before_softmax and ranking is scores:
            ranking = router_logits  # in the same order, and none of them underflows
        return ranking.topk(self.top_k, dim=-1).indices

    def _weigh(self, router_logits: torch.Tensor, scores: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        if self.config.topk_before_softmax:
            return router_logits.gather(-1, top_k_index).softmax(dim=-1)
        top_k_weights = scores.gather(-1, top_k_index)
        if self.config.norm_topk_prob:
            # Biases can choose experts whose scores all underflow to 0.
            top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return top_k_weights

    def _drop(self, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor | None:
        factor = self.config.expert_capacity_factor
        if factor is None or not self.training:
            return None
        capacity = expert_capacity(len(top_k_index), self.num_experts, self.top_k, factor)
        policy = self.config.token_drop_policy
        return drop_beyond_capacity(top_k_weights, top_k_index, self.num_experts, capacity, policy)

    def _apply(self, fn, recurse: bool = True):
        bias = self.e_score_correction_bias

        def keep_bias_in_float32(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if tensor is not bias or applied.dtype == bias.dtype else bias.to(applied.device)

        return super()._apply(keep_bias_in_float32, recurse)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


class ExpertChoiceRouter(MoERouter):
    r"""Let every expert choose its tokens (Zhou et al. 2022, arXiv 2202.09368, sec. 3.2).

    Each expert takes the `C = ceil(factor * T * K / E)` tokens with the highest score for it, and a token's output is
    the sum over whichever experts took it, weighted by these scores: the load is balanced by construction. The choice
    compares all tokens of the micro-batch, later ones included. So it is not causal, in training and in evaluation:
    the loss that such a model reports can see the future, and it cannot generate.
    """

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights `(E, C)` float32 and the tokens `(E, C)` int64 of every expert, of `(T, H)` inputs."""
        num_tokens = len(hidden_states)
        router_logits = self.compute_logits(hidden_states)
        scores = self.compute_scores(router_logits).t()
        factor = self.config.expert_capacity_factor or 1.0
        capacity = min(num_tokens, expert_capacity(num_tokens, self.num_experts, self.top_k, factor))
        token_index = scores.detach().topk(capacity, dim=-1).indices
        # As those of the other routers: experts by token, here as many as took it, and E for none.
        chosen = torch.full_like(scores, self.num_experts, dtype=torch.int64)
        experts = torch.arange(self.num_experts, device=chosen.device)[:, None]
        self.tap(router_logits, chosen.scatter(1, token_index, experts.expand_as(token_index)).t(), None)
        return scores.gather(1, token_index) * self.config.routed_scaling_factor, token_index


def count_assignments(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how many of the `(T, K)` assignments go to each expert, `(E,)` int64, without waiting for the device."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=top_k_index.device)
    return counts.scatter_add_(0, top_k_index.reshape(-1), torch.ones_like(top_k_index).reshape(-1))
