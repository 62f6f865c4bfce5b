"""Which function of its weights a configuration describes, apart from everything else that it says."""

import math
from collections.abc import Iterable
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...configuration_moe import MoEConfig
from ...errors import ConfigError

# How to train and how to begin, and what `mlp_layer_types` says in other words.
_NO_PART_OF_IT = {
    "initializer_range",
    "hidden_dropout",
    "use_cache",
    "output_router_logits",
    "output_z_loss_coef",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "router_z_loss_coef",
    "router_bias_update_speed",
    "router_jitter_noise",
    "sinkhorn_iterations",
    "expert_capacity_factor",
    "token_drop_policy",
    "moe_layer_indices",
    "decoder_sparse_step",
    "first_k_dense_replace",
}
_OF_SPARSE_LAYERS = {
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_before_softmax",
    "n_group",
    "topk_group",
    "group_scoring_func",
    "router_balancing",
}


def function_of(config: MoEConfig) -> dict[str, Any]:
    """Return the fields that decide which function a model computes, without those that have no say in this one."""
    unused = set(_NO_PART_OF_IT)
    if not config.num_sparse_layers:
        unused |= _OF_SPARSE_LAYERS
    if "dense" not in config.mlp_layer_types:
        unused.add("intermediate_size")
    if not config.use_qk_norm:
        unused.add("qk_norm_scope")
    if config.topk_group == config.n_group:
        unused |= {"n_group", "topk_group", "group_scoring_func"}
    # First what tells most about a difference: the layers.
    names = ["mlp_layer_types", *MoEConfig.__annotations__]
    values = {name: getattr(config, name) for name in names if name not in unused}
    values["rope_parameters"] = {"partial_rotary_factor": 1.0, **config.rope_parameters}
    values["rope_parameters"].pop("type", None)
    if values.get("router_balancing") == "expert_choice":
        values["expert_capacity_factor"] = config.expert_capacity_factor or 1.0
    elif values.get("router_balancing") != "loss_free":
        # How the load is balanced in training is no part of the model; a correction bias of zeros is none.
        values.pop("router_balancing", None)
    if values.pop("topk_before_softmax", False):
        values["norm_topk_prob"] = True  # the same weights
    return values


def make_config(values: dict[str, Any]) -> MoEConfig:
    """Construct `MoEConfig(**values)`; whatever is wrong becomes a `ConfigError` of one sentence."""
    try:
        return MoEConfig(**values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(one_sentence(error)) from None


def one_sentence(error: Exception, *, first: bool = False) -> str:
    """Return the line of a library's message that says it all: the last of a strict dataclass, the first of the hub."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0 if first else -1].removeprefix("TypeError: ").rstrip(".") + "."


def layer_pattern(sparse: Iterable[int], num_layers: int) -> tuple[int, list[int]]:
    """Say which layers are sparse as `decoder_sparse_step` and the layers that are dense in spite of it.

    Returns:
        The largest step n for which every sparse layer i has `(i + 1) % n == 0`, and the exceptions.
    """
    sparse = set(sparse)
    step = math.gcd(*(i + 1 for i in sparse))
    return step, [i for i in range(step - 1, num_layers, step) if i not in sparse]
