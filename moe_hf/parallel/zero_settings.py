"""What DeepSpeed makes of the ZeRO section of its JSON, as plain values: defaults filled in, "auto" replaced."""

from __future__ import annotations

from dataclasses import dataclass

from .deepspeed_config import Config, get_section, lookup, mistake

# What Transformers puts in place of "auto", by the hidden size (transformers/integrations/deepspeed.py).
_AUTO = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
    "stage3_gather_16bit_weights_on_model_save": lambda hidden: False,
}

_ITEM_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ZeroSettings:
    """How ZeRO shares out the states of training; sizes of buckets and distances are in elements."""

    stage: int
    reduce_bucket_size: int
    reduce_scatter: bool
    use_multi_rank_bucket_allreduce: bool
    overlap_comm: bool
    contiguous_gradients: bool
    sub_group_size: int
    prefetch_bucket_size: int
    param_persistence_threshold: int
    model_persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int
    offload_optimizer: str = "none"
    offload_param: str = "none"
    gradient_item_size: int | None = None
    """Bytes of an element of the accumulated gradients; `None` for those of the weights."""
    communication_item_size: int | None = None
    """Bytes of an element while gradients are reduced; `None` for those of the weights."""


def zero_settings(config: Config, hidden_size: int) -> ZeroSettings:
    """Return the settings of ZeRO in a DeepSpeed JSON, as a run of a model of this width has them.

    Args:
        config: the DeepSpeed JSON, checked by `check_deepspeed_config`.
        hidden_size: of the model, which some settings follow from where they are "auto".

    Raises:
        ConfigError: DeepSpeed does not accept the section.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = dict(get_section(config, "zero_optimization"))
    for key, value_for in _AUTO.items():
        if section.get(key) == "auto":
            section[key] = value_for(hidden_size)
    zero = DeepSpeedZeroConfig(**section)
    return ZeroSettings(
        stage=int(zero.stage),
        reduce_bucket_size=zero.reduce_bucket_size,
        reduce_scatter=zero.reduce_scatter,
        use_multi_rank_bucket_allreduce=zero.use_multi_rank_bucket_allreduce,
        overlap_comm=zero.overlap_comm,
        contiguous_gradients=zero.contiguous_gradients,
        sub_group_size=zero.sub_group_size,
        prefetch_bucket_size=zero.prefetch_bucket_size,
        param_persistence_threshold=zero.param_persistence_threshold,
        model_persistence_threshold=zero.model_persistence_threshold,
        max_live_parameters=zero.max_live_parameters,
        max_reuse_distance=zero.max_reuse_distance,
        offload_optimizer=_device(zero.offload_optimizer),
        offload_param=_device(zero.offload_param),
        gradient_item_size=_item_size(config, "data_types.grad_accum_dtype"),
        communication_item_size=_item_size(config, "communication_data_type"),
    )


def _device(offload) -> str:
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


def _item_size(config: Config, key: str) -> int | None:
    name = lookup(config, key, None)
    if name is None:
        return None
    if name not in _ITEM_SIZES:
        raise mistake(key, name, f"must be one of {', '.join(_ITEM_SIZES)}")
    return _ITEM_SIZES[name]
