"""What a peer is: something that computes the same layer, or says why it does not."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from moe_hf.errors import ConfigError

from ..cases import LayerCase


@dataclass(frozen=True)
class Layer:
    """A sparse block that holds its weights and is ready to run.

    Args:
        module: owns the parameters.
        forward: from tokens `(T, H)` to `(T, H)`.
        gradients: of `router` `(E, H)`, `gate_up` `(E, 2I, H)` and `down` `(E, H, I)`, as far as they are trained.
    """

    module: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    gradients: Callable[[], dict[str, torch.Tensor]]

    def clear_gradients(self) -> None:
        """Forget the gradients of the weights."""
        self.module.zero_grad(set_to_none=True)


class LayerPeer(ABC):
    """One way to compute a sparse block."""

    name: str

    @abstractmethod
    def unavailable(self, case: LayerCase, device: str) -> str | None:
        """Return why this peer cannot compute the case here, or `None`."""

    @abstractmethod
    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        """Return the layer with copies of the weights, which are in Transformers' layout, on their device.

        A peer with a layout of its own converts here: it is how the peer stores them, and is not measured.
        """


def needs_cuda_package(package: str, device: str) -> str | None:
    """Return why a package of CUDA kernels cannot be used, or `None`."""
    if device != "cuda":
        return "it has kernels for CUDA only"
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    return None


def copy_into(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a weight into a parameter of the same shape, dtype and device."""
    if (parameter.shape, parameter.dtype, parameter.device) != (value.shape, value.dtype, value.device):
        raise ValueError(
            f"a parameter is {tuple(parameter.shape)} {parameter.dtype} on {parameter.device}, "
            f"its weight {tuple(value.shape)} {value.dtype} on {value.device}"
        )
    parameter.data.copy_(value)


def refusal(check: Callable[[], object]) -> str | None:
    """Return what our program says where it refuses to run like this, or `None`."""
    try:
        check()
    except ConfigError as error:
        return str(error)
    return None
