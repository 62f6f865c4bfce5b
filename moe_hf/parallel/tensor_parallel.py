"""Tensor parallelism through DeepSpeed's AutoTP: what is cut, who holds what of it, which norm is clipped by.

Ranks of one group share matrices and read the same rows. A pair of matrices is cut where nothing has to be exchanged
between them: the first along its outputs (column-parallel), the second along its inputs (row-parallel), after which one
all-reduce adds up the parts (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053, section 3). Attention is cut between
its key heads. Embeddings, head, norms and routers are whole on every rank, and experts belong to AutoEP.

Transformers' own plan, `base_model_tp_plan`, has styles that AutoTP rejects; here is the same in AutoTP's words.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from .deepspeed_config import Config, autoep_enabled, zero_stage
from .parallel_sizes import parallel_sizes

# Patterns of parameter names.
_BY_OUTPUTS = [r".*\.self_attn\.(q|k|v|gate)_proj\.weight$", r".*\.mlp\.(shared_experts\.)?(gate|up)_proj\.weight$"]
_BY_INPUTS = [r".*\.self_attn\.o_proj\.weight$", r".*\.mlp\.(shared_experts\.)?down_proj\.weight$"]
# Every rank normalises its own heads, so that each has a part of the gradient.
_WHOLE_WITH_PARTIAL_GRADIENTS = [r".*\.self_attn\.[qk]_norm\.weight$"]


def with_split_plan(config: Config) -> Config:
    """Return the DeepSpeed JSON with AutoTP told which parameters to cut; without tensor parallelism as it is."""
    if parallel_sizes(config).tensor == 1:
        return config
    config = copy.deepcopy(config)
    config["tensor_parallel"]["partition_config"] = {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": _BY_OUTPUTS, "partition_type": "column"},
            {"patterns": _BY_INPUTS, "partition_type": "row"},
            {"patterns": _WHOLE_WITH_PARTIAL_GRADIENTS, "partition_type": "skip", "grad_allreduce": True},
        ],
    }
    # DeepSpeed counts every rank as if it read rows of its own, and refuses the number that is right.
    config["train_batch_size"] = "auto"
    return config


@contextmanager
def loading_whole_weights() -> Iterator[None]:
    """Let Transformers load weights at ZeRO 3 as without tensor parallelism, which begins with the engine only.

    It refuses to convert weights of other names where they may be cut; these are still whole.
    """
    from transformers.integrations.deepspeed import deepspeed_config

    config = deepspeed_config() or {}
    section = config.pop("tensor_parallel", None)
    try:
        yield
    finally:
        if section is not None:
            config["tensor_parallel"] = section


def clip_by_all_experts(engine, config: Config) -> None:
    """Let ZeRO 1 and 2 count the gradient of every rank's experts in the norm that they report and clip by.

    DeepSpeed takes a parameter that is not cut for a copy on all but the first rank of a tensor-parallel group. Under
    AutoEP these ranks hold other experts, whose gradients it leaves out. ZeRO 3 counts them.

    Args:
        engine: of DeepSpeed, ready to train.
        config: its JSON.
    """
    if parallel_sizes(config).tensor == 1 or not autoep_enabled(config) or zero_stage(config) == 3:
        return
    from deepspeed.moe.utils import is_moe_param

    optimizer = engine.optimizer
    norm_of = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients, params, norm_type=2):
        rank = optimizer.model_parallel_rank
        if any(is_moe_param(param) for param in params):
            optimizer.model_parallel_rank = 0  # what this rank holds is no copy
        try:
            return norm_of(gradients, params, norm_type)
        finally:
            optimizer.model_parallel_rank = rank

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def num_copies(param: nn.Parameter) -> int:
    """Return how many ranks of this rank's tensor-parallel group hold the same piece of a parameter's gradient.

    Args:
        param: of an engine, at ZeRO 1, 2 or 3.
    """
    from deepspeed.moe.utils import is_moe_param

    group = _group()
    if group is None or is_split(param) or is_moe_param(param):
        return 1
    ranks = dist.get_process_group_ranks(group)
    # At ZeRO 3 whatever was made inside `zero.Init`, and not cut, is sliced over all ranks.
    sliced_over = getattr(param, "ds_process_group", None)
    if sliced_over is not None and set(ranks) <= set(dist.get_process_group_ranks(sliced_over)):
        return 1
    return len(ranks)


def is_split(tensor: torch.Tensor) -> bool:
    """Return whether AutoTP has left this rank only its part of a tensor."""
    return getattr(tensor, "tensor_model_parallel", False)


@torch.no_grad()
def join_parts(param: nn.Parameter) -> torch.Tensor | None:
    """Return the whole of a parameter that is cut, on the CPU of rank 0, `None` elsewhere (a collective call).

    Args:
        param: holds this rank's part, gathered if ZeRO has sliced that too.
    """
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    group, dim = _group(), getattr(param, DS_AUTOTP_UC_META)["partition_dim"]
    if dist.get_process_group_ranks(group)[0] != 0:
        return None  # replicas: only the group that rank 0 belongs to sends
    own = param.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))] if dist.get_rank() == 0 else None
    dist.gather(own, parts, dst=0, group=group)
    return None if parts is None else torch.cat(parts, dim=dim).cpu()


def _group() -> dist.ProcessGroup | None:
    from deepspeed.utils import groups

    try:
        return groups.get_tensor_model_parallel_group()
    except AssertionError:
        return None
