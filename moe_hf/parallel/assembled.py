"""Whole weights of a live model by the most obvious way: every rank sends all it has, and one puts it together.

A second opinion on `gather`, which exports use and which never holds more than one tensor. This one is for models that
are small, and shares no line with it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from .processes import rank, world_size


def assembled_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return all parameters and saved buffers by their Hugging Face names on rank 0 (a collective call).

    Args:
        model: an `MoEForCausalLM`, sharded by ZeRO and AutoEP or not.

    Returns:
        On the CPU, `None` on other ranks.

    Raises:
        RuntimeError: a buffer, which all ranks should agree on, is not the same on all of them.
    """
    ep_ranks = {name: module.ep_rank for name, module in model.named_modules() if hasattr(module, "ep_rank")}
    tensors = {name: _whole(parameter) for name, parameter in model.named_parameters()}
    saved = model.state_dict().keys()
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in saved}
    experts = {name: tensor for name, tensor in tensors.items() if _layer_of(name) in ep_ranks}
    everyone = _exchange((ep_ranks, experts, buffers))
    for _, _, others in everyone:
        if any(not torch.equal(others[name], buffer) for name, buffer in buffers.items()):
            raise RuntimeError("ranks have different buffers")
    if rank() != 0:
        return None
    shared = {name: tensor for name, tensor in (tensors | buffers).items() if name not in experts}
    whole = {name.replace(".mlp.router.", ".mlp.gate."): tensor for name, tensor in shared.items()}
    for layer in ep_ranks:
        by_ep_rank = {ranks[layer]: theirs for ranks, theirs, _ in everyone}
        whole |= _experts_of(layer, [by_ep_rank[number] for number in sorted(by_ep_rank)])
    return whole


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return a copy of what this rank's parameter is when ZeRO-3 has put it together."""
    gathered = nullcontext()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([parameter])
    with gathered:
        return parameter.detach().to("cpu", copy=True)


def _layer_of(name: str) -> str:
    return name.partition(".experts.w")[0] if ".experts.w" in name else ""


def _exchange(own: tuple) -> list[tuple]:
    if world_size() == 1 or not dist.is_initialized():
        return [own]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _experts_of(layer: str, ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return one layer's experts `(E, 2I, H)` and `(E, H, I)`, one after the other, from the ranks that share them."""
    gate_up, down = [], []
    for theirs in ranks:
        gates, ups, downs = (theirs[f"{layer}.experts.{name}"] for name in ("w1", "w3", "w2"))
        gate_up += [torch.cat([gate, up]) for gate, up in zip(gates, ups, strict=True)]
        down += list(downs)
    prefix = f"{layer}.experts."
    return {f"{prefix}gate_up_proj": torch.stack(gate_up), f"{prefix}down_proj": torch.stack(down)}
