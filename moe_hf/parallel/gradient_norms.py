"""Norms of the gradient by parameter family, whatever ZeRO and AutoEP have made of the gradient.

At every ZeRO stage the gradient of the whole batch exists for a moment: after the last micro-batch's reduction and
before the clipping, cut into pieces that lie on different ranks or repeated on several of them. Each rank adds up the
squares of what it holds, divided by the number of ranks that hold the same, so that the sum over all ranks is exact
and nothing needs to be gathered.
"""

from collections.abc import Iterator

import torch
from torch import nn

from ..parameter_families import FAMILIES, family_of
from .nvme_optimizer import held_on_nvme
from .processes import world_size
from .versions import require_supported

# Elements that are converted to float64 at once.
_PIECE_SIZE = 2**24


class GradientNorms:
    """Squared norms of the gradient of one optimizer step, for each of `FAMILIES`.

    The gradient is that of the whole batch, over ranks and accumulation steps, without the loss scale and before
    clipping: the square root of the sum over families is the norm that clipping looks at. Squares are added in
    float64, which float32 sums of many elements are not exact enough for.

    Nothing is attached to the engine but from `measure_next_step` to the end of the step that is measured.

    Args:
        model: a `DeepSpeedEngine`, `DistributedDataParallel` or the model itself, after it was prepared for training.

    Raises:
        ValueError: the model has a parameter that belongs to no family.
    """

    def __init__(self, model: nn.Module) -> None:
        self._engine = model if hasattr(model, "zero_optimization_stage") else None
        if self._engine is not None:
            require_supported("deepspeed")
        self._module = getattr(model, "module", model)
        self._family = {id(param): family_of(name) for name, param in self._module.named_parameters()}
        self._is_due = False
        self._squares: torch.Tensor | None = None

    def measure_next_step(self) -> None:
        """Measure the coming optimizer step; without DeepSpeed, when `measure` is called."""
        self._squares, self._is_due = None, True
        if self._engine is not None:
            # Accelerate runs backward, clipping and step of an engine as one call; this is where the last two begin.
            self._engine._take_model_step = self._measure_and_take_step

    def measure(self, loss_scale: float = 1.0) -> None:
        """Measure now if a measurement is due and no engine does it; call it between backward and clipping.

        Args:
            loss_scale: what the loss was multiplied by before the backward pass.
        """
        if self._is_due and self._engine is None:
            self._squares, self._is_due = self._measured(loss_scale), False

    def squared_sums(self) -> torch.Tensor | None:
        """Return this rank's share of the squared norms, and forget it.

        Returns:
            float64 tensor `(len(FAMILIES),)` on the model's device, in the order of `FAMILIES`; summed over all ranks
            it gives the squared norms, NaN or infinite where the gradient is. `None`, on all ranks alike, when no step
            was measured since the last call or when the engine has skipped it.
        """
        squares, self._squares = self._squares, None
        return squares

    def _measure_and_take_step(self, *args, **kwargs) -> None:
        del self._engine._take_model_step  # the class's own shows again
        self._is_due = False
        # The scale, too, before the step, which may change it.
        squares = self._measured(_loss_scale(self._engine))
        self._engine._take_model_step(*args, **kwargs)
        self._squares = squares if self._engine.was_step_applied() else None

    @torch.no_grad()
    def _measured(self, loss_scale: float) -> torch.Tensor:
        device = next(self._module.parameters()).device
        squares = {family: [torch.zeros((), dtype=torch.float64, device=device)] for family in FAMILIES}
        for param, gradient, num_holders in self._gradients():
            square = _squared_norm(gradient).to(device)
            squares[self._family[id(param)]].append(square / num_holders)
        return torch.stack([torch.stack(own).sum() for own in squares.values()]) / loss_scale**2

    def _gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor, int]]:
        """Yield each parameter of which this rank holds some gradient, that gradient, and how many ranks hold it."""
        stage = 0 if self._engine is None else self._engine.zero_optimization_stage()
        optimizer = None if self._engine is None else self._engine.optimizer
        if hasattr(optimizer, "averaged_gradients") and stage < 3:
            held = _held_at_stages_1_and_2(optimizer)
        elif getattr(optimizer, "swap_optimizer", False):
            held = held_on_nvme(optimizer)
        elif stage == 3:
            held = _held_at_stage_3(self._module)
        else:
            yield from self._held_whole(optimizer)
            return
        for param, gradient in held:
            yield param, gradient, 1

    def _held_whole(self, optimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor, int]]:
        """Without ZeRO every rank has whole gradients, and those of experts repeat on each expert-parallel group."""
        ep_size = self._ep_sizes()
        for param, gradient in _whole_gradients(self._module, optimizer):
            yield param, gradient, world_size() // ep_size.get(id(param), 1)

    def _ep_sizes(self) -> dict[int, int]:
        """Return the number of ranks that share one set of experts, by the `id` of each parameter that is shared."""
        if not any(name.endswith(".experts.w1") for name, _ in self._module.named_parameters()):
            return {}
        from .autoep import autoep_layers

        layers = [layer for _, layer in autoep_layers(self._module)]
        return {id(param): layer.ep_size for layer in layers for param in layer.experts.parameters()}


def _squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    pieces = gradient.reshape(-1).split(_PIECE_SIZE)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def _loss_scale(engine) -> float:
    """Return what the engine has multiplied the loss by, which is not always its optimizer's `loss_scale`."""
    scale = getattr(engine.optimizer, "scale_if_loss", None)
    if scale is None:  # without ZeRO the engine scales no loss
        return 1.0
    with torch.enable_grad():
        loss = torch.ones((), device=engine.device, requires_grad=True).clone()  # what has no history is not scaled
    return scale(loss).item()


# --------------------------------------------------------------------------------------------------------------------
# Where DeepSpeed keeps the gradient of the whole batch between the last backward pass and the step


def _held_at_stages_1_and_2(optimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield the parameters in this rank's partition, each with the gradient of what lies there of it."""
    if optimizer.cpu_offload:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()  # gradients may still be on their way
    for group, params in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            gradients = optimizer.offload_gradient_dict[group]
        else:
            gradients = [g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        # A partition may end with padding that is not marked.
        yield from zip(params, gradients, strict=False)


def _held_at_stage_3(module: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    from deepspeed.utils import safe_get_local_grad

    for param in module.parameters():
        if param.requires_grad:
            yield param, safe_get_local_grad(param)


def _whole_gradients(module: nn.Module, optimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer, which accumulates beside the parameters
        for params, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            yield from zip(params, gradients, strict=True)
        return
    for param in module.parameters():
        if param.grad is not None:
            yield param, param.grad
