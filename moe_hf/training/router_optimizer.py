"""The routers' weights in the optimizer: in a group with settings of its own, or in none.

`--router_learning_rate_multiplier` and `--router_weight_decay` give them a group, `--freeze_router` takes them out of
the optimizer. Their learning rate is a multiple of the others' at every step: schedules scale each group's own rate.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError
from ..parameter_families import is_router_weight
from .router_arguments import RouterArguments

# Marks the routers' group: DeepSpeed exchanges the parameters of a group, but keeps its settings.
_MARK = "routers"

# What a scheduler remembers for each group, in units of its learning rate.
_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


def router_grouping(
    args: argparse.Namespace | RouterArguments, config: MoEConfig, deepspeed_json: dict | None = None
) -> str:
    """Return where the optimizer is to have the routers' weights: `Topology.routers`.

    Args:
        args: with the three flags.
        config: of the model.
        deepspeed_json: of the run, `None` without DeepSpeed.

    Raises:
        ConfigError: a flag that would have no effect on this model, beside this JSON, or beside another flag.
    """
    flags = []
    if args.router_learning_rate_multiplier != 1:
        flags.append(f"--router_learning_rate_multiplier {args.router_learning_rate_multiplier}")
    if args.router_weight_decay is not None:
        flags.append(f"--router_weight_decay {args.router_weight_decay}")
    if args.freeze_router:
        if flags:
            raise ConfigError(f"{flags[0]} has no effect on routers that --freeze_router takes out of the optimizer.")
        flags.append("--freeze_router")
    if not flags:
        return "shared"
    if not config.num_sparse_layers:
        raise ConfigError(f"{flags[0]} needs a model with sparse layers, but this one has none.")
    if deepspeed_json is not None and "optimizer" in deepspeed_json:
        raise ConfigError(
            f"{flags[0]} has no effect beside the optimizer section of the DeepSpeed JSON, which makes one group of "
            "all parameters; delete the section and name the optimizer by --optim."
        )
    return "frozen" if args.freeze_router else "own"


def freeze_routers(model: nn.Module) -> None:
    """Take the routers' weights out of training; call it before there is an optimizer or an engine.

    `RouterBiasUpdater` then leaves their biases alone too.
    """
    for _, weight in _router_weights(model):
        weight.requires_grad_(False)


def split_router_group(optimizer: Optimizer, model: nn.Module, args: RouterArguments) -> None:
    """Move the routers' weights into a group of their own, with their learning rate and weight decay.

    Args:
        optimizer: fresh, without state and schedule; the group comes after those that it has.
        model: not yet converted by AutoEP, whose routers then take the places of these.
        args: with the multiplier and the weight decay, `None` for that of the others.

    Raises:
        ConfigError: the optimizer does not have the routers in its groups.
    """
    routers = {id(weight) for _, weight in _router_weights(model)}
    for group in list(optimizer.param_groups):
        own = [param for param in group["params"] if id(param) in routers]
        if own:
            group["params"] = [param for param in group["params"] if id(param) not in routers]
            optimizer.param_groups.append({**group, "params": own, _MARK: True})
            routers -= {id(param) for param in own}
    if routers:
        raise ConfigError(
            f"The optimizer {type(optimizer).__name__} does not let routers have their own learning rate and weight "
            "decay; use --optim adamw_torch, or leave --router_learning_rate_multiplier and --router_weight_decay out."
        )
    keep_router_settings(optimizer, None, args)


def keep_router_settings(optimizer: Optimizer, scheduler: LRScheduler | None, args: RouterArguments) -> None:
    """Set learning rate and weight decay of the routers' group by those of the first one, wherever they are remembered.

    Checkpoints and schedulers bring settings of their own, which may be those of a run with other flags.

    Args:
        optimizer: with or without a group of the routers; DeepSpeed's or the Trainer's wrapper of one will do.
        scheduler: of the optimizer, `None` as long as there is none.
        args: with the multiplier and the weight decay.
    """
    multiplier, first = args.router_learning_rate_multiplier, optimizer.param_groups[0]
    for index, group in enumerate(optimizer.param_groups):
        if not group.get(_MARK):
            continue
        decay = args.router_weight_decay
        group["weight_decay"] = first["weight_decay"] if decay is None else decay
        for name in ("lr", "initial_lr"):
            if name in first:
                group[name] = multiplier * first[name]
        for name in _RATES:
            rates = getattr(scheduler, name, None)
            if isinstance(rates, list):
                rates[index] = multiplier * rates[0]


def load_regrouped(optimizer: Optimizer, model: nn.Module, path: Path, routers_then: str) -> None:
    """Load the states of an optimizer that had the routers in another group, or in none, without DeepSpeed.

    Each parameter keeps the states that it has, and each group this run's settings. Routers that were frozen begin
    without states, which such an optimizer makes and counts for each parameter by itself.

    Args:
        optimizer: fresh, with this run's groups.
        model: whose parameters it has.
        path: `optimizer.pt` of a checkpoint.
        routers_then: `Topology.routers` of the run that wrote it.

    Raises:
        CheckpointError: the saved groups are not those of such an optimizer.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]
    order_then = _regrouped(model, set(groups[0]), routers_then)
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group) for group in order_then]:
        raise CheckpointError(
            f"{path} has optimizer groups of an unknown order; add --reset_optimizer to start from the weights only."
        )
    # Its parameters are numbered in the order of the groups.
    places = {name: place for place, name in enumerate(itertools.chain(*order_then))}
    states = {name: saved["state"][place] for name, place in places.items() if place in saved["state"]}
    order_now = itertools.chain(*groups)
    optimizer.load_state_dict(
        {
            "state": {place: states[name] for place, name in enumerate(order_now) if name in states},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _regrouped(model: nn.Module, decaying: set[str], routers: str) -> list[list[str]]:
    """Return the names in the groups of the Trainer's optimizer: what decays, what does not, routers if apart."""
    named = [name for name, _ in model.named_parameters()]
    of_routers = [name for name in named if is_router_weight(name)]
    if routers == "shared":
        decaying = decaying | set(of_routers)
    else:
        decaying = decaying - set(of_routers)
    plain = [name for name in named if name not in decaying and name not in of_routers]
    groups = [[name for name in named if name in decaying], plain]
    return [*groups, of_routers] if routers == "own" else groups


def _router_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if is_router_weight(name))
