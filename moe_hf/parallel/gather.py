"""Assemble whole tensors, under their Hugging Face names, from what ZeRO, AutoEP and AutoTP have scattered."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from .processes import rank
from .tensor_parallel import is_split, join_parts


class FullTensorReader:
    """Read the parameters of a live model one by one as if it had never been sharded.

    Every rank must call `read` with the same names in the same order: each call is a collective.

    Args:
        model: an `MoEForCausalLM`, plain or inside an engine, or the part of one that a pipeline has on these ranks.
        root: the rank that gets the tensors, in the first expert-parallel group of those that hold the model.
    """

    def __init__(self, model: nn.Module, root: int = 0) -> None:
        self._model, self._root = model, root
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        self._autoep_layers = {}
        if any(name.endswith(".experts.w1") for name in self._tensors):
            from .autoep import autoep_layers

            self._autoep_layers = dict(autoep_layers(model))

    def read(self, name: str) -> torch.Tensor | None:
        """Return the whole tensor called `name` in the HF format, on the CPU of the root; `None` on other ranks.

        Raises:
            KeyError: the model has no such tensor (on every rank alike).
        """
        block_name, _, leaf = name.partition(".mlp.")
        layer = self._autoep_layers.get(f"{block_name}.mlp")
        if layer is not None and leaf == "experts.gate_up_proj":
            return self._read_experts(layer, (layer.experts.w1, layer.experts.w3))
        if layer is not None and leaf == "experts.down_proj":
            return self._read_experts(layer, (layer.experts.w2,))
        if layer is not None and leaf.startswith("gate."):
            name = f"{block_name}.mlp.router.{leaf.removeprefix('gate.')}"
        return self._read_dense(self._tensors[name])

    def _read_dense(self, tensor: torch.Tensor) -> torch.Tensor | None:
        with _gathered([tensor]):
            if is_split(tensor):
                return join_parts(tensor)
            return tensor.detach().to("cpu", copy=True) if rank() == self._root else None

    def _read_experts(self, layer, parts: tuple[nn.Parameter, ...]) -> torch.Tensor | None:
        """Join `parts` along the rows of each expert, then the ranks' experts in the order of their EP rank."""
        with _gathered(list(parts)):
            local = torch.cat([part.detach() for part in parts], dim=1).contiguous()
        # Expert replicas: only the group that the root belongs to sends.
        if dist.get_process_group_ranks(layer.ep_group)[0] != self._root:
            return None
        if rank() != self._root:
            dist.gather(local, dst=self._root, group=layer.ep_group)
            return None
        whole = local.new_empty((layer.num_experts, *local.shape[1:]))
        # Received in place, so that the tensor is held once.
        dist.gather(local, list(whole.chunk(layer.ep_size)), dst=self._root, group=layer.ep_group)
        return whole.cpu()


def _gathered(tensors: list[torch.Tensor]):
    """Context in which ZeRO-3 parameters hold their full data on every rank of their group."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)
