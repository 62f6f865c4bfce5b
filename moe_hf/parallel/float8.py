"""Compute the products of linear layers with operands of 8 bits, through torchao's float8 training.

Operands are scaled by their largest element at every product (e4m3 forward, e5m2 for gradients; Micikevicius et al.
2022, arXiv 2209.05433); weights, gradients and everything saved keep their names, shapes and dtype. Routers,
embeddings, the head and the routed experts, which are no linear layers, stay as they are.
"""

import importlib.util
import warnings

import torch
from torch import nn

from ..errors import ConfigError
from ..parameter_families import family_of

# Matrix units multiply tiles of 16 elements.
_MULTIPLE = 16

# Ada and Hopper were the first with matrix units for 8 bits.
_FIRST_CAPABILITY = (8, 9)


def check_float8_supported() -> None:
    """Refuse a machine on which float8 can neither run nor be emulated.

    Raises:
        ConfigError: torchao is not installed, or the accelerator has no matrix units for 8 bits.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("--fp8 needs torchao; install it with: pip install 'moe_hf[fp8]'.")
    if not torch.accelerator.is_available():
        return
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ConfigError("--fp8 needs an NVIDIA GPU, or a CPU, which emulates it; use --bf16 alone.")
    capability = torch.cuda.get_device_capability()
    if capability < _FIRST_CAPABILITY:
        raise ConfigError(
            f"--fp8 needs a GPU with compute capability 8.9 or higher (Ada, Hopper, Blackwell), but "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; use --bf16 alone."
        )


def convert_to_float8(model: nn.Module, *, checkpointed: bool = False) -> list[str]:
    """Exchange the linear layers of attention, dense MLPs and shared experts for float8 ones, keeping their parameters.

    Call it before there is an optimizer or an engine. Without an accelerator the 8 bits are emulated: results are
    rounded in the same places, and nothing becomes faster.

    Args:
        model: an `MoEForCausalLM`, whole or partitioned by `zero.Init`.
        checkpointed: whether activations are recomputed in the backward pass.

    Returns:
        The names of the converted layers.

    Raises:
        ConfigError: no layer has sizes that matrix units for 8 bits can multiply.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear_utils import swap_linear_layers

    # Padding, because a batch has any number of tokens, over which the weights' gradients are summed.
    config = Float8LinearConfig(emulate=not torch.cuda.is_available(), pad_inner_dim=True)
    layer_class = _float8_linear()

    def is_wanted(layer: nn.Linear, name: str) -> bool:
        fits = layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
        return fits and family_of(f"{name}.weight") in ("attention", "dense_mlp")

    def convert(layer: nn.Linear) -> nn.Linear:
        new = layer_class.from_float(layer, config=config)
        new.checkpointed = checkpointed
        return new.train(layer.training)

    swap_linear_layers(model, convert, module_filter_fn=is_wanted)
    converted = [name for name, layer in model.named_modules() if isinstance(layer, layer_class)]
    if not converted:
        raise ConfigError(
            f"--fp8 finds no linear layer whose input and output are multiples of {_MULTIPLE}; change hidden_size and "
            "head_dim, or use --bf16 alone."
        )
    return converted


def _float8_linear() -> type[nn.Linear]:
    """Return the class of converted layers, defined here because torchao is optional."""
    from torchao.float8.float8_linear import Float8Linear

    class MoEFloat8Linear(Float8Linear):
        """torchao's float8 layer, which keeps no weight in memory that ZeRO-3 has gathered."""

        checkpointed = False

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            # Recomputed layers keep their weights for a moment only, and let nobody else save their inputs.
            if self.checkpointed or not hasattr(self.weight, "ds_id"):
                return super().forward(input)
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return super().forward(input)

        def _pack(self, saved: torch.Tensor) -> torch.Tensor | None:
            # A view of the gathered weight would keep it in memory until the backward pass, which gathers it again.
            is_weight = saved.data_ptr() == self.weight.data_ptr() and saved.shape == self.weight.t().shape
            return None if is_weight else saved

        def _unpack(self, packed: torch.Tensor | None) -> torch.Tensor:
            return self.weight.detach().t() if packed is None else packed

    return MoEFloat8Linear
