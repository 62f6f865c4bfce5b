"""Liger's kernels (Hsu et al. 2024, arXiv 2410.10989) in the place of a model's norms, rotations and activations.

As in Liger's own patches methods of single modules are exchanged: names of weights stay, and the hooks of ZeRO, of
tensor parallelism and of telemetry run around them. Routed experts have kernels of their own. The loss uses Liger
without being told, where it is installed (`liger_cross_entropy.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import MethodType

import torch
from torch import nn

from ..errors import ConfigError
from ..language_head import LanguageHead
from ..modeling_moe import MoEAttention, MoEMLP, MoERMSNorm


@dataclass(frozen=True)
class LigerKernels:
    """Which of Liger's kernels are used, by the names that its own patches have for them."""

    rms_norm: bool = True
    swiglu: bool = True
    rope: bool = True
    fused_linear_cross_entropy: bool = True


def check_liger(settings: dict | None, *, compiles: bool) -> None:
    """Find before a run what speaks against `--use_liger_kernel`.

    Args:
        settings: `--liger_kernel_config`.
        compiles: whether `--torch_compile` is given.

    Raises:
        ConfigError: unknown settings, no GPU, no Liger, or a compiler for the same parts.
    """
    known = [field.name for field in fields(LigerKernels)]
    for name, value in (settings or {}).items():
        if name not in known or not isinstance(value, bool):
            raise ConfigError(
                f"liger_kernel_config has {name}={value}; there are {', '.join(known)}, each true or false."
            )
    if compiles:
        raise ConfigError("--use_liger_kernel and --torch_compile are two ways to speed up the same parts; give one.")
    if not torch.cuda.is_available():
        raise ConfigError("--use_liger_kernel needs a GPU; leave it out.")
    if find_spec("liger_kernel") is None:
        raise ConfigError("--use_liger_kernel needs Liger: pip install 'moe_hf[liger]'.")


def use_liger_kernels(model: nn.Module, kernels: LigerKernels) -> int:
    """Let the modules of `model` run Liger's kernels from now on; again changes nothing.

    Args:
        model: with `moe_hf` layers.
        kernels: which ones.

    Returns:
        How many modules were changed.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(self: MoERMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        # As for Llama: only the normalisation is in float32, and the gradient takes the memory of the one that comes
        # in, which products of matrices have made.
        offset, casting_mode, in_place = 0.0, "llama", True
        return LigerRMSNormFunction.apply(
            hidden_states, self.weight, self.variance_epsilon, offset, casting_mode, in_place
        )

    def swiglu(self: MoEMLP, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(LigerSiLUMulFunction.apply(gate, up))

    def rotate(
        self: MoEAttention, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return LigerRopeFunction.apply(query, key, cos, sin)

    exchanged: dict[type[nn.Module], tuple[bool, str, Callable]] = {
        MoERMSNorm: (kernels.rms_norm, "forward", rms_norm),
        MoEMLP: (kernels.swiglu, "forward", swiglu),
        MoEAttention: (kernels.rope, "_rotate", rotate),
    }
    num_changed = 0
    for module in model.modules():
        is_used, name, function = exchanged.get(type(module), (False, "", None))
        if is_used:
            setattr(module, name, MethodType(function, module))
            num_changed += 1
        if isinstance(module, LanguageHead):
            module.fused = kernels.fused_linear_cross_entropy
    return num_changed
