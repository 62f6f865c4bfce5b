"""Continue a run on another layout: convert its checkpoint once, load it, and put the schedule where it was."""

from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from ..checkpoint.sharded import ShardedCheckpoint
from ..checkpoint.universal import BUFFERS_NAME, MOMENTS, TAG, is_intact, universal_folder, write_universal
from ..errors import CheckpointError, ConfigError, UserError
from ..parallel.processes import raise_together, rank
from ..parallel.restore import load_universal
from .saving import could_not_write

# Optimizers with the two moments that a conversion carries over.
_ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")


def load_resharded(engine, checkpoint: Path, *, expert_parallel: bool) -> None:
    """Load a checkpoint of any DeepSpeed layout into a fresh engine; every rank must call it.

    The first time, rank 0 converts the checkpoint to a Universal Checkpoint inside its folder, from which later runs of
    any layout load.

    Args:
        engine: fresh from `deepspeed.initialize`, with the layout to continue on.
        checkpoint: a `checkpoint-N` folder.
        expert_parallel: the engine has converted its sparse layers with AutoEP.

    Raises:
        ConfigError: the engine's optimizer keeps other states than the checkpoint's.
        CheckpointError: the checkpoint is damaged, or the disk has no room for the conversion.
    """
    base = engine.optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer
    if type(base).__name__ not in _ADAMS:
        raise ConfigError(
            f"The optimizer {type(base).__name__} cannot continue from a checkpoint of another layout; "
            "use --optim adamw_torch, or --reset_optimizer to start from the weights only."
        )
    folder = universal_folder(checkpoint, expert_parallel)
    error = None
    if rank() == 0 and not is_intact(folder):
        error = _convert(checkpoint, folder, expert_parallel)
    raise_together(error)
    buffers = torch.load(folder / TAG / BUFFERS_NAME, weights_only=True)
    load_universal(engine, folder, TAG, buffers)


def _convert(checkpoint: Path, folder: Path, expert_parallel: bool) -> UserError | None:
    """Convert on this rank, and return what went wrong as an error that all ranks can share."""
    try:
        source = ShardedCheckpoint(checkpoint)
        if missing := [state for state in MOMENTS if state not in source.state_names]:
            return CheckpointError(
                f"{checkpoint} has no {missing[0]}, so it was written with an optimizer whose states cannot be "
                "converted to another layout; add --reset_optimizer to start from its weights only."
            )
        with tqdm(total=len(source.shapes), desc=f"converting {checkpoint.name}", unit="tensor") as bar:
            write_universal(source, folder, expert_parallel=expert_parallel, on_tensor=lambda name: bar.update())
    except UserError as error:
        return error
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        return could_not_write(folder, error)
    return None


def continue_schedule(scheduler: LRScheduler, optimizer: Optimizer, saved: dict) -> None:
    """Put a fresh scheduler where another, of an optimizer with other groups, has stopped.

    Args:
        scheduler: made for `optimizer`.
        optimizer: of this run; its learning rates are set.
        saved: `state_dict()` of the other scheduler.
    """
    # Lists have an entry for each group: this scheduler's own stay.
    of_groups = {name: value for name, value in scheduler.state_dict().items() if isinstance(value, list)}
    scheduler.load_state_dict(saved | of_groups)
    if isinstance(scheduler, LambdaLR):
        factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    elif isinstance(scheduler, ReduceLROnPlateau) or len(set(saved["_last_lr"])) == 1:
        # Groups of routers with their own rate are put right by `keep_router_settings`.
        rates = saved["_last_lr"][:1] * len(optimizer.param_groups)
    else:
        raise CheckpointError(
            f"A {type(scheduler).__name__} cannot continue with {len(optimizer.param_groups)} optimizer groups instead "
            f"of {len(saved['_last_lr'])}; resume with the same layout."
        )
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
