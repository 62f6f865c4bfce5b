"""Which kernels compute on which device."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from . import experts_aten


def backend_of(tensor: torch.Tensor) -> ModuleType:
    """Return the module of kernels for the device of a tensor: Triton's on CUDA where Triton is installed."""
    if not (tensor.is_cuda and _has_triton()):
        return experts_aten
    from . import experts_triton  # asks Triton for a driver, which only a machine with a GPU has

    return experts_triton


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
