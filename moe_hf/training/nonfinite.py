"""Steps whose gradients are NaN or infinite: skipped, counted, and a reason to stop when they go on."""

import torch
from torch.optim import Optimizer


class NonFiniteGuard:
    """Skip a step of a plain optimizer when any gradient is not finite.

    ZeRO and the 16-bit optimizers of DeepSpeed skip by themselves; this is for what has no such check: training without
    DeepSpeed, and ZeRO stage 0 in float32. Gradients are reduced over ranks by then, so that all ranks decide alike.
    """

    def __init__(self) -> None:
        self.skipped = False

    def attach(self, optimizer: Optimizer) -> None:
        """Check before every `optimizer.step()` from now on."""
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args, kwargs) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters])
        self.skipped = bool(norms) and not torch.isfinite(torch.stack(norms)).all().item()
        if self.skipped:
            for parameter in parameters:
                parameter.grad = None  # an optimizer passes over parameters without a gradient


class SkipCounter:
    """Counts skipped steps, in all and in a row.

    Args:
        limit: number in a row at which training is to stop.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.total = 0
        self.in_a_row = 0

    def add(self, skipped: bool) -> bool:
        """Count one step; return whether the limit is reached."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return self.in_a_row >= self._limit
