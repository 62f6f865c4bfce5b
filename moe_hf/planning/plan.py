"""The plan of one setting: what the fullest rank holds, what a rank sends, how long a step takes, does it fit."""

from dataclasses import asdict, dataclass

from ..checkpoint.model_card import ParameterCount
from ..configuration_moe import MoEConfig
from .activations import activation_amounts
from .communication import Collective, collectives
from .flops import TokenFlops, count_parameters, flops_per_token
from .gathering import Gathering, gathering
from .hardware import Hardware
from .memory import COMPUTING, GPU, HOST, Amount, peak
from .parameters import Parameter, local_parameters, optimizer_groups
from .setting import Setting
from .states import state_amounts
from .step_time import StepTime, seconds_of, step_time

RESERVED = 0.1
"""Share of a GPU's memory that CUDA, NCCL and the allocator's gaps are taken to need."""

EFFICIENCY = 0.3
"""Share of a GPU's peak that computation is taken to reach."""


@dataclass(frozen=True)
class Plan:
    """What a setting needs.

    Args:
        setting: how the model is trained.
        hardware: on what.
        gpu_memory: of one GPU, in GB (10⁹ bytes).
        parameters: of the model.
        flops: of one token.
        amounts: what the fullest rank holds.
        messages: of one optimizer step.
        time: of one optimizer step.
    """

    setting: Setting
    hardware: Hardware
    gpu_memory: float
    parameters: ParameterCount
    flops: TokenFlops
    amounts: list[Amount]
    messages: list[Collective]
    time: StepTime

    @property
    def peak(self) -> int:
        """The most bytes on a GPU at one time."""
        return peak(self.amounts)

    @property
    def usable(self) -> int:
        """Bytes of a GPU for the plan."""
        return int(self.gpu_memory * 1e9 * (1 - RESERVED))

    @property
    def fits(self) -> bool:
        """Whether the fullest rank finds room on its GPU."""
        return self.peak <= self.usable

    def peak_in(self, place: str) -> int:
        """Return the most bytes of the fullest rank in a place at one time."""
        return peak(self.amounts, place)

    def seconds_of(self, message: Collective) -> float:
        """Return the estimated time of a collective."""
        return seconds_of(message, self.setting, self.hardware)

    def as_json(self) -> dict:
        """Return plain values; bytes are those of one rank, of messages on average."""
        setting = self.setting
        return {
            "fits": self.fits,
            "gpus": setting.world_size,
            "gpu_memory_bytes": int(self.gpu_memory * 1e9),
            "usable_bytes": self.usable,
            "peak_bytes": self.peak,
            "host_bytes": peak(self.amounts, HOST),
            "setting": asdict(setting),
            "hardware": asdict(self.hardware),
            "parameters": asdict(self.parameters),
            "flops_per_token": asdict(self.flops) | {"total": self.flops.total},
            "memory": [asdict(amount) for amount in self.amounts],
            "messages": [
                asdict(m) | {"sent": int(m.sent), "seconds": seconds_of(m, setting, self.hardware)}
                for m in self.messages
            ],
            "step": asdict(self.time)
            | {"seconds": self.time.seconds, "tokens_per_second": self.time.tokens_per_second},
        }


def make_plan(
    config: MoEConfig,
    setting: Setting,
    hardware: Hardware,
    gpu_memory: float | None = None,
    efficiency: float = EFFICIENCY,
) -> Plan:
    """Work out what a setting needs.

    Args:
        config: of the model.
        setting: how it is trained.
        hardware: on what.
        gpu_memory: of one GPU in GB, if it is not what the hardware has.
        efficiency: share of the GPU's peak that computation reaches.
    """
    groups = optimizer_groups(config, setting)
    gathered = gathering(local_parameters(config, setting), config, setting) if setting.zero.stage == 3 else None
    buffers = [*_buffers(groups, setting, gathered), *activation_amounts(config, setting)]
    # ZeRO's shares of different ranks differ by the parameters that their borders cut.
    ranks = range(setting.world_size if setting.zero.stage in (1, 2) else 1)
    states = max((state_amounts(groups, setting, rank) for rank in ranks), key=lambda held: peak([*held, *buffers]))
    messages = collectives(groups, config, setting, gathered)
    return Plan(
        setting=setting,
        hardware=hardware,
        gpu_memory=hardware.memory if gpu_memory is None else gpu_memory,
        parameters=count_parameters(config),
        flops=flops_per_token(config, setting.sequence_length),
        amounts=[*states, *buffers],
        messages=messages,
        time=step_time(config, setting, states, messages, hardware, efficiency),
    )


def _buffers(groups: list[list[Parameter]], setting: Setting, gathered: Gathering | None) -> list[Amount]:
    """Return what messages are made in: buckets of gradients, and at ZeRO 3 the weights in use."""
    zero = setting.zero
    largest = max(p.numel for group in groups for p in group)
    bucket = setting.item_size * zero.reduce_bucket_size
    # One matrix's gradient before it is in the bucket; what is larger than the bucket is reduced by itself.
    found = [Amount("buffers", "one gradient", setting.item_size * largest, when=COMPUTING)]
    if zero.stage == 0:
        return found
    reduced = setting.communication_item_size * max(min(zero.reduce_bucket_size, sum_of(groups)), largest)
    found.append(Amount("buffers", "gradients being reduced", reduced, when=COMPUTING))
    if gathered is None:
        times = 2 if zero.overlap_comm else 1
        return [*found, Amount("buffers", "bucket of gradients", times * bucket, when=COMPUTING)]
    return [
        *found,
        Amount("buffers", "bucket of gradients", bucket),
        Amount("buffers", "whole weights in use", setting.item_size * gathered.live, GPU, COMPUTING),
        Amount("buffers", "weights being gathered", setting.item_size * gathered.largest, GPU, COMPUTING),
    ]


def sum_of(groups: list[list[Parameter]]) -> int:
    """Return the elements of all groups."""
    return sum(p.numel for group in groups for p in group)
