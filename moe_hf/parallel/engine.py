"""Prepare a model for a DeepSpeed engine."""

import torch
import torch.distributed as dist
from torch import nn

from ..modeling_moe import MoEForCausalLM, MoESparseBlock
from .deepspeed_config import autoep_enabled, zero_stage
from .muon import leave_others_to_adam, uses_muon
from .processes import world_size


def prepare_for_training(
    model: MoEForCausalLM, deepspeed_config: dict | None, fetched_whole: tuple[type[nn.Module], ...] = ()
) -> None:
    """Make `model` fit for data-parallel training; call it before `deepspeed.initialize`.

    Registers the model with AutoEP, tells ZeRO-3 to fetch a sparse block as one unit, and hands the model the sum
    over data-parallel ranks that its balancing loss needs.

    Args:
        model: not yet wrapped.
        deepspeed_config: the JSON, if there is one.
        fetched_whole: classes of modules that ZeRO-3 is to fetch as one unit, besides sparse blocks.
    """
    # `zero.Init` rounds what is made inside it to the training dtype, and not every Transformers spares the angles.
    model.model.rotary_emb.compute_frequencies()
    if world_size() > 1:
        model.reduce_router_statistics = sum_over_data_parallel_ranks
    if deepspeed_config is None:
        return
    if uses_muon(deepspeed_config):
        leave_others_to_adam()
    if autoep_enabled(deepspeed_config):
        from .autoep import register_preset

        register_preset()
    else:
        # Which expert runs depends on the data: a block fetched piecewise would let ranks wait for different pieces.
        fetched_whole = (MoESparseBlock, *fetched_whole)
    if zero_stage(deepspeed_config) == 3 and fetched_whole:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(fetched_whole), raise_if_not_found=False)


def join_process_group() -> None:
    """Let DeepSpeed use the process group there is; without it `zero.Init` takes this process for the only one."""
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@torch.no_grad()
def sum_over_data_parallel_ranks(statistics: torch.Tensor) -> torch.Tensor:
    """Return the sum of an integer tensor over the data-parallel ranks (a collective call)."""
    group = None
    try:
        from deepspeed.utils import groups

        group = groups._get_data_parallel_group()
    except (ImportError, AssertionError):
        pass  # no DeepSpeed here: every process is a data-parallel rank
    total = statistics.clone()
    dist.all_reduce(total, group=group)
    return total


def report_clipped_norm(engine) -> None:
    """Let a float32 engine without ZeRO report its gradient norm, which it computes for clipping and then forgets."""

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())
        engine._global_grad_norm = norm

    engine.clip_fp32_gradients = clip
