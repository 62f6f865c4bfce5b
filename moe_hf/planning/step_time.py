"""How long one optimizer step takes on named hardware: a roofline with a stated share of each peak.

Williams et al. 2009 (https://doi.org/10.1145/1498765.1498785): the time of each part is what it computes or moves, over
what the hardware can. What runs beside computation counts only as far as it is longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..configuration_moe import MoEConfig
from .communication import Collective
from .flops import flops_per_token
from .hardware import Hardware
from .memory import Amount, total
from .setting import Setting

# Forward passes are a third of the FLOPs of a step; a checkpointed layer has two.
_WITH_RECOMPUTATION = 4 / 3

# Share of a bandwidth that large messages and memory copies reach.
_BANDWIDTH_SHARE = 0.8

# Times that the optimizer reads or writes one of its states, in a step.
_PASSES = 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Args:
        computing: forward and backward passes.
        waiting: for messages that nothing runs beside.
        beside: of messages that run beside computation, all of them.
        stepping: the optimizer, with what it moves to host memory and back.
        tokens: of all ranks in this step.
    """

    computing: float
    waiting: float
    beside: float
    stepping: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.computing, self.beside) + self.waiting + self.stepping

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks, in a second."""
        return self.tokens / self.seconds


def step_time(
    config: MoEConfig,
    setting: Setting,
    states: list[Amount],
    messages: Iterable[Collective],
    hardware: Hardware,
    efficiency: float,
) -> StepTime:
    """Estimate the time of one optimizer step.

    Args:
        config: of the model.
        setting: how it is trained.
        states: of `state_amounts`.
        messages: of `collectives`.
        hardware: one GPU and its links.
        efficiency: share of the GPU's peak that computation reaches.
    """
    peak = hardware.peak_tflops * 1e12 * (1 if setting.reduced_precision else 0.5)
    flops = flops_per_token(config, setting.sequence_length).total * setting.tokens * setting.accumulation
    flops *= (_WITH_RECOMPUTATION if setting.checkpointing else 1) / setting.tp_size
    waiting = beside = 0.0
    for message in messages:
        seconds = seconds_of(message, setting, hardware)
        waiting, beside = (waiting + seconds, beside) if message.waits else (waiting, beside + seconds)
    return StepTime(
        computing=flops / (peak * efficiency),
        waiting=waiting,
        beside=beside,
        stepping=_stepping(setting, states, hardware),
        tokens=setting.tokens_per_step,
    )


def seconds_of(message: Collective, setting: Setting, hardware: Hardware) -> float:
    """Return the time of a collective: what a rank sends, over the slowest link on the ring."""
    crosses = message.crosses_machines(setting.gpus_per_node)
    bandwidth = hardware.network if crosses else hardware.nvlink
    return message.sent / (bandwidth * 1e9 * _BANDWIDTH_SHARE)


def _stepping(setting: Setting, states: list[Amount], hardware: Hardware) -> float:
    """Every state is read and written once, where it is; what is elsewhere moves over the link to the host."""
    here = total(states, kind="optimizer") + total(states, kind="gradients")
    away = sum(a.bytes for a in states if a.place != "gpu" and a.kind in ("optimizer", "gradients"))
    links = sum(a.bytes for a in states if a.place != "gpu" and a.kind == "gradients") + sum(
        a.bytes for a in states if a.place != "gpu" and a.kind == "weights"
    )
    seconds = _PASSES * (here / hardware.hbm + away / hardware.host_memory) + links / hardware.host_link
    return seconds / (1e9 * _BANDWIDTH_SHARE)
