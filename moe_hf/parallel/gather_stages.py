"""Whole tensors of a model whose layers lie on the stages of a pipeline."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from .gather import FullTensorReader
from .processes import rank


def tensor_reader(model: nn.Module) -> "FullTensorReader | StagedTensorReader":
    """Return the reader that fits a live model: in one piece, or the stage of a pipeline."""
    return StagedTensorReader(model) if hasattr(model, "layout") else FullTensorReader(model)


class StagedTensorReader:
    """As `FullTensorReader`: one tensor at a time is made whole on its stage and sent to rank 0.

    Args:
        model: a `PipelinedCausalLM`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layout, self._own_stage = model.layout, model.stage_id
        self._reader = FullTensorReader(model, root=self._layout.first_rank(self._own_stage))
        self._device = model.device

    def read(self, name: str) -> torch.Tensor | None:
        """Return the whole tensor called `name` in the HF format, on the CPU of rank 0; `None` on other ranks.

        Raises:
            KeyError: the model has no such tensor (on every rank alike).
        """
        stage = self._layout.stage_of(name)
        sender, tensor, described = self._layout.first_rank(stage), None, [None]
        if stage == self._own_stage:
            with contextlib.suppress(KeyError):  # of which the others have to hear first
                tensor = self._reader.read(name)
        if tensor is not None:
            described = [(tensor.shape, tensor.dtype)]
        dist.broadcast_object_list(described, src=sender, device=self._device)
        if described[0] is None:
            raise KeyError(name)
        if sender == 0:
            return tensor
        if rank() == sender:
            dist.send(tensor.contiguous().to(self._device), dst=0)
        elif rank() == 0:
            shape, dtype = described[0]
            received = torch.empty(shape, dtype=dtype, device=self._device)
            dist.recv(received, src=sender)
            return received.cpu()
        return None
