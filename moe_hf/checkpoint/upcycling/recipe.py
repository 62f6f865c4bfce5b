"""What is to be made of a dense model, and whether that can be."""

import copy
import math
import re
from dataclasses import dataclass

from ...configuration_moe import MoEConfig
from ...errors import ConfigError
from .methods import Method


@dataclass(frozen=True)
class UpcyclingRecipe:
    """What is made of the dense model.

    Args:
        method: how the experts come from the dense MLP.
        num_experts: experts of every sparse layer.
        num_experts_per_tok: experts that each token visits.
        layers: which layers become sparse, as `parse_layers` reads it; the others stay dense.
        seed: of the router and of whatever the method draws.
        router_std: standard deviation of the router's weights; the model's `initializer_range` when not given.
    """

    method: Method
    num_experts: int
    num_experts_per_tok: int
    layers: str = "all"
    seed: int = 0
    router_std: float | None = None


def parse_layers(text: str, num_layers: int) -> list[str]:
    """Return `"dense"` or `"sparse"` for each of `num_layers` layers.

    Args:
        text: `"all"`; `"every-N"`, the layers i with `(i + 1) % N == 0`; or indices from 0 on, as in `"1,3,5"`.
        num_layers: of the model.

    Raises:
        ConfigError: the text is of another form, or names a layer that is not there, or none that is.
    """
    if text == "all":
        sparse = set(range(num_layers))
    elif match := re.fullmatch(r"every-(\d+)", text):
        step = int(match[1])
        if not 1 <= step <= num_layers:
            raise ConfigError(f"--layers {text}: the step must be between 1 and the model's {num_layers} layers.")
        sparse = set(range(step - 1, num_layers, step))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        indices = [int(index) for index in text.split(",")]
        sparse = set(indices)
        if len(sparse) < len(indices) or max(sparse) >= num_layers:
            raise ConfigError(f"--layers {text} must be different layers between 0 and {num_layers - 1}.")
    else:
        raise ConfigError(f"--layers {text!r} must be 'all', 'every-N' or indices as in '1,3,5'.")
    return ["sparse" if i in sparse else "dense" for i in range(num_layers)]


# Below it the scores of a router with inputs of the usual size begin to be equal in float32.
_SMALLEST_ROUTER_STD = 1e-4

# Without these the weights of a token's experts would not sum to 1; in a dense model they had no meaning.
_PLAIN_ROUTING = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "shared_expert_gate": False,
    "topk_before_softmax": False,
    "router_jitter_noise": 0.0,
    "expert_capacity_factor": None,
}
_LAYER_SHORTHANDS = {"moe_layer_indices": None, "decoder_sparse_step": 1, "first_k_dense_replace": 0}


def upcycled_config(dense: MoEConfig, recipe: UpcyclingRecipe) -> MoEConfig:
    """Return the configuration of the sparse model.

    Args:
        dense: configuration of a model without experts.
        recipe: what is to be made of it.

    Raises:
        ConfigError: the model has experts already, or the recipe does not fit it or contradicts itself.
    """
    _check(dense, recipe)
    changes = {
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.num_experts_per_tok,
        "moe_intermediate_size": recipe.method.expert_width(dense.intermediate_size),
        "mlp_layer_types": parse_layers(recipe.layers, dense.num_hidden_layers),
    }
    values = {name: copy.deepcopy(getattr(dense, name)) for name in MoEConfig.__annotations__}
    return MoEConfig(**(values | _PLAIN_ROUTING | _LAYER_SHORTHANDS | changes))


def _check(dense: MoEConfig, recipe: UpcyclingRecipe) -> None:
    num_experts, num_experts_per_tok = recipe.num_experts, recipe.num_experts_per_tok
    if dense.num_sparse_layers:
        raise ConfigError(
            f"The model already has {dense.num_experts} experts in {dense.num_sparse_layers} layers; upcycling starts "
            "from a dense one."
        )
    if num_experts < 2:
        raise ConfigError(f"--num-experts {num_experts} must be at least 2.")
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ConfigError(
            f"--num-experts-per-tok {num_experts_per_tok} must be between 1 and --num-experts {num_experts}."
        )
    _check_router_std(dense, recipe)
    recipe.method.check(num_experts, num_experts_per_tok, dense.intermediate_size)


def _check_router_std(dense: MoEConfig, recipe: UpcyclingRecipe) -> None:
    router_std = dense.initializer_range if recipe.router_std is None else recipe.router_std
    if not _SMALLEST_ROUTER_STD <= router_std < math.inf:
        source = "of the model's initializer_range" if recipe.router_std is None else "of --router-std"
        raise ConfigError(
            f"A router with the standard deviation {router_std} {source} could not tell experts apart; give "
            f"--router-std of at least {_SMALLEST_ROUTER_STD}, usually 0.02."
        )
