"""Arguments that concern the router: how it is optimized, what is reported about it, when it raises an alarm."""

import math
from dataclasses import dataclass, field

from ..errors import ConfigError


@dataclass
class RouterArguments:
    """How the router learns, and what is told of it. Which experts it chooses is said by `MoEConfig`."""

    router_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the routers' weights, as a multiple of the others'."}
    )
    router_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the routers' weights; default: --weight_decay."}
    )
    freeze_router: bool = field(
        default=False, metadata={"help": "Leave the routers' weights and biases as they are at the start."}
    )
    router_image_steps: int = field(
        default=0, metadata={"help": "Draw the experts' load as a heat map every so many steps; 0 for never."}
    )
    dead_expert_steps: int = field(
        default=100,
        metadata={"help": "An expert is dead when it got no token in this many steps; a collapse must last as long."},
    )
    router_collapse_threshold: float = field(
        default=0.5,
        metadata={"help": "Warn when the entropy of a layer's load falls under this share of its maximum; 0: never."},
    )
    router_logit_threshold: float = field(
        default=100.0, metadata={"help": "Warn when a router logit grows beyond this, either way; 0: never."}
    )
    stop_on_router_collapse: bool = field(
        default=False, metadata={"help": "End the run with a checkpoint when a layer's load has collapsed."}
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Dense matmul peak of one device in TFLOP/s, for the model FLOPs utilisation; default: of the GPU "
            "if it is a known one."
        },
    )

    def check_router_arguments(self) -> None:
        """Raise `ConfigError` with one sentence for a value out of its range."""
        for name in ("router_learning_rate_multiplier", "router_logit_threshold"):
            _check(name, getattr(self, name), 0.0, math.inf)
        _check("router_collapse_threshold", self.router_collapse_threshold, 0.0, 1.0)
        if self.router_weight_decay is not None:
            _check("router_weight_decay", self.router_weight_decay, 0.0, math.inf)
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            raise ConfigError(f"peak_tflops={self.peak_tflops} must be a finite number above 0.")
        if self.router_image_steps < 0:
            raise ConfigError(f"router_image_steps={self.router_image_steps} must be at least 0 (0 draws none).")
        if self.dead_expert_steps < 1:
            raise ConfigError(f"dead_expert_steps={self.dead_expert_steps} must be at least 1.")


def _check(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        limits = f"at least {least:g}" if math.isinf(most) else f"between {least:g} and {most:g}"
        raise ConfigError(f"{name}={value} must be a finite number, {limits}.")
