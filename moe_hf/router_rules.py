"""What the fields of `MoEConfig` that concern the router may be, each by itself and together."""

import math

from transformers.utils import logging

logger = logging.get_logger(__name__)

_CHOICES = {
    "scoring_func": ("softmax", "sigmoid"),
    "group_scoring_func": ("top2_sum", "max"),
    "router_balancing": ("aux_loss", "loss_free", "sinkhorn", "expert_choice", "none"),
    "router_aux_loss_scope": ("global", "local", "sequence"),
    "token_drop_policy": ("probability", "position"),
}


def check_router_values(config) -> None:
    """Raise `ValueError` with one sentence when a field has a value that it can never have."""
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_speed"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number that is not negative.")
    for name in ("routed_scaling_factor", "expert_capacity_factor"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number above 0.")
    if not 0.0 <= config.router_jitter_noise < 1.0:
        raise ValueError(f"router_jitter_noise={config.router_jitter_noise} must be at least 0 and below 1.")
    if config.sinkhorn_iterations < 1:
        raise ValueError(f"sinkhorn_iterations={config.sinkhorn_iterations} must be at least 1.")
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r} must be one of {', '.join(map(repr, allowed))}.")


def check_router(config) -> None:
    """Raise `ValueError` with one sentence when the fields of a model with sparse layers contradict each other."""
    _check_groups(config)
    if config.topk_before_softmax and config.scoring_func != "softmax":
        raise ValueError(
            f"topk_before_softmax=True has no meaning with scoring_func={config.scoring_func!r}, which scores every "
            "expert by itself; leave it out."
        )
    if config.topk_before_softmax and not config.norm_topk_prob:
        raise ValueError(
            "norm_topk_prob=False contradicts topk_before_softmax=True, whose weights always sum to 1; leave one out."
        )
    if config.router_balancing == "expert_choice":
        _check_expert_choice(config)
    elif config.num_experts_per_tok == 1 < config.num_experts and config.norm_topk_prob:
        # Not refused: what is upcycled from a dense model begins like this.
        logger.warning_once(
            "num_experts_per_tok=1 with norm_topk_prob=True: every routing weight is 1, so that the language-modelling "
            "loss cannot teach the router; set norm_topk_prob=False."
        )


def _check_expert_choice(config) -> None:
    for name, value, meant_for in (
        ("topk_before_softmax", config.topk_before_softmax, False),
        ("topk_group", config.topk_group, config.n_group),
    ):
        if value != meant_for:
            raise ValueError(
                f"{name}={value} has no meaning with router_balancing='expert_choice', where experts choose tokens; "
                "leave it out."
            )


def _check_groups(config) -> None:
    num_experts, n_group, topk_group = config.num_experts, config.n_group, config.topk_group
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"n_group={n_group} must be at least 1 and divide num_experts={num_experts}.")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group={topk_group} must be between 1 and n_group={n_group}.")
    group_size = num_experts // n_group
    if n_group > 1 and group_size < 2 and config.group_scoring_func == "top2_sum":
        raise ValueError(
            f"group_scoring_func='top2_sum' needs at least 2 experts in each group, but n_group={n_group} leaves "
            f"{group_size} of num_experts={num_experts}; use fewer groups, or 'max'."
        )
    if topk_group * group_size < config.num_experts_per_tok:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than the {topk_group * group_size} experts in "
            f"the groups that topk_group={topk_group} of n_group={n_group} keeps; raise topk_group."
        )
