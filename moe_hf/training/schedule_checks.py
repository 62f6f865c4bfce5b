"""Build the schedule of the learning rate once before anything starts, to see whether its keywords fit."""

import argparse
import json
import math

import torch
from transformers import SchedulerType, get_scheduler

from ..errors import ConfigError


def check_schedule(args: argparse.Namespace) -> None:
    """Refuse keywords that the schedule does not know, lacks, or that leave no step for a part of it.

    Args:
        args: with the training arguments that say how long and after which schedule to train.

    Raises:
        ConfigError: naming the schedule and its keywords.
    """
    name, kwargs = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    if isinstance(kwargs, str):
        kwargs = json.loads(kwargs)
    if name in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return  # they look at losses, and Trainer wants more for them than keywords
    known_steps = args.max_steps if args.max_steps > 0 else 0
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(known_steps * args.warmup_steps)
    if name == SchedulerType.WARMUP_STABLE_DECAY:
        _check_room(args, warmup, kwargs)
    try:
        get_scheduler(name, _optimizer(), warmup, max(1, known_steps), kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--lr_scheduler_type {SchedulerType(name).value} does not go with --lr_scheduler_kwargs "
            f"'{json.dumps(kwargs)}': {' '.join(str(error).split())}."
        ) from error


def _check_room(args: argparse.Namespace, warmup: int, kwargs: dict) -> None:
    """A decay that begins before the warm-up has ended would let the rate jump."""
    decay = kwargs.get("num_decay_steps")
    if decay is None:
        raise ConfigError(
            "--lr_scheduler_type warmup_stable_decay needs to know how long it decays; add --lr_scheduler_kwargs "
            "'{\"num_decay_steps\": 1000}'."
        )
    if not isinstance(decay, int) or decay < 1:
        raise ConfigError(f"num_decay_steps={decay} in --lr_scheduler_kwargs must be a whole number of steps.")
    if 0 < args.max_steps < warmup + decay and "num_stable_steps" not in kwargs:
        raise ConfigError(
            f"num_decay_steps={decay} in --lr_scheduler_kwargs and {warmup} steps of warm-up do not fit into "
            f"max_steps={args.max_steps}; use at most {max(0, args.max_steps - warmup)}."
        )


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
