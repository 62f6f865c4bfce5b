"""One way to train a model: everything besides the model that memory, messages and time depend on."""

from dataclasses import dataclass

from ..errors import ConfigError
from ..parallel.deepspeed_config import Config, expert_parallel_size, lookup
from ..parallel.parallel_sizes import parallel_sizes
from ..parallel.zero_settings import ZeroSettings, zero_settings

ITEM_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element in training, by precision."""

# What the formulas know of optimizers: Adam's two moments in FP32.
_PLANNED_OPTIMIZERS = ("adam", "adamw")

# Options that move states or messages to where no formula here looks for them, and their value without effect.
_UNPLANNED = {
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zenflow": None,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.parameter_alignment": False,
    "zero_optimization.contiguous_gradients": True,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "fp16.fp16_master_weights_and_grads": False,
    "torch_autocast.enabled": False,
    "use_data_before_expert_parallelism": False,
    "expert_parallel.gate_up_impl": "separate",
}


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Args:
        world_size: ranks, one for each GPU.
        zero: the settings of ZeRO.
        ep_size: ranks that share one set of experts; 0 without AutoEP, where every rank holds all of them.
        tp_size: ranks that share every weight matrix.
        item_size: bytes of an element of the weights in training.
        micro_batch: sequences of a rank in one forward pass.
        sequence_length: tokens of a sequence.
        accumulation: forward passes for one optimizer step.
        checkpointing: whether layers keep their input only and are computed again backward.
        gpus_per_node: ranks of a machine.
    """

    world_size: int
    zero: ZeroSettings
    ep_size: int = 0
    tp_size: int = 1
    item_size: int = 2
    micro_batch: int = 1
    sequence_length: int = 2048
    accumulation: int = 1
    checkpointing: bool = True
    gpus_per_node: int = 8

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read different rows, and that share the states of all but the experts."""
        return self.world_size // self.tp_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same experts, and share their states."""
        return self.world_size // self.ep_size if self.ep_size else self.data_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a rank in one forward pass."""
        return self.micro_batch * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks in one optimizer step."""
        return self.tokens * self.accumulation * self.data_parallel_size

    @property
    def gradient_item_size(self) -> int:
        """Bytes of an element of the accumulated gradients."""
        return self.zero.gradient_item_size or self.item_size

    @property
    def communication_item_size(self) -> int:
        """Bytes of an element while gradients are reduced."""
        return self.zero.communication_item_size or self.item_size

    @property
    def reduced_precision(self) -> bool:
        """Whether the weights of training have less than 32 bits, so that the optimizer has its own."""
        return self.item_size < 4


def read_setting(config: Config, hidden_size: int, world_size: int, precision: str, **batch) -> Setting:
    """Return the setting that a DeepSpeed JSON describes.

    Args:
        config: the DeepSpeed JSON, checked by `check_deepspeed_config`.
        hidden_size: of the model.
        world_size: number of ranks.
        precision: `"bf16"`, `"fp16"` or `"fp32"`.
        **batch: other fields of `Setting`: `micro_batch`, `sequence_length`, `accumulation`, …

    Raises:
        ConfigError: the JSON has an option, or a kind of parallelism, for which there is no formula.
    """
    sizes = parallel_sizes(config)
    for name in ("sequence", "pipeline"):
        if (size := getattr(sizes, name)) > 1:
            raise ConfigError(
                f"{name}_parallel_size={size} is not planned: the formulas are of data, expert and tensor "
                "parallelism; plan with 1"
            )
    sizes.data_parallel_size(world_size)  # refuses what does not divide
    for key, harmless in _UNPLANNED.items():
        if (value := lookup(config, key, harmless)) != harmless:
            raise ConfigError(f"{key}={value!r} is not planned: there is no formula for it; delete it")
    _check_optimizer(config)
    setting = Setting(
        world_size=world_size,
        zero=zero_settings(config, hidden_size),
        ep_size=expert_parallel_size(config),
        tp_size=sizes.tensor,
        item_size=ITEM_SIZES[precision],
        **batch,
    )
    if setting.zero.stage == 1 and setting.gradient_item_size > setting.item_size:
        raise ConfigError(
            "data_types.grad_accum_dtype='fp32' is not planned at ZeRO stage 1, where another optimizer of DeepSpeed "
            "takes over; use stage 2 or 3"
        )
    return setting


def _check_optimizer(config: Config) -> None:
    name = lookup(config, "optimizer.type", "AdamW")
    if name.lower() not in _PLANNED_OPTIMIZERS:
        raise ConfigError(f"optimizer.type={name} is not planned: the formulas are of AdamW; plan the JSON with it")
