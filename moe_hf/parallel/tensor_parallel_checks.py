"""Refuse, before any process group starts, what tensor parallelism cannot do with a model, a JSON or a run."""

from __future__ import annotations

import math

from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from .deepspeed_config import Config, expert_parallel_size, get_section, lookup, mistake, zero_stage
from .muon import uses_muon
from .parallel_sizes import parallel_sizes

# Keys of tensor_parallel that only repeat the size; the others would cut other parameters, or other ways.
_SIZE_KEYS = ("autotp_size", "tp")

# ZeRO's options that slice parameters or gradients over groups which do not know of tensor parallelism.
_OTHER_SLICES = {
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
}


def check_tensor_parallel_json(config: Config) -> None:
    """Refuse a DeepSpeed JSON whose other settings do not go with its tensor parallelism.

    Args:
        config: the DeepSpeed JSON, with the sizes from the command line already in it.

    Raises:
        ConfigError: with the first mistake found.
    """
    sizes = parallel_sizes(config)
    _check_section(config, sizes.tensor)
    if sizes.tensor == 1:
        return
    with_tensor = f"with tensor_parallel_size={sizes.tensor}"
    if expert_parallel_size(config) == 1:
        raise ConfigError(
            f"expert_parallel_size=1 does not work {with_tensor}; use 0, which leaves all experts on every rank as "
            "well, or 2 and more"
        )
    if config.get("use_data_before_expert_parallelism"):
        raise mistake("use_data_before_expert_parallelism", True, f"does not work {with_tensor}; delete it")
    _check_zero(config, with_tensor)
    if uses_muon(config):
        raise ConfigError(f'optimizer.type="Muon" needs whole matrices and does not work {with_tensor}; use AdamW')
    if lookup(config, "compile.deepcompile", False):
        raise mistake("compile.deepcompile", True, f"does not work {with_tensor}; delete it")


def check_tensor_parallel_model(config: Config, model: MoEConfig) -> None:
    """Refuse a model that cannot be cut into as many parts as the DeepSpeed JSON says.

    Args:
        config: the DeepSpeed JSON.
        model: what it is to train.

    Raises:
        ConfigError: with the first mistake found.
    """
    size = parallel_sizes(config).tensor
    if size == 1:
        return
    if model.use_qk_norm and model.qk_norm_scope == "full":
        raise ConfigError(
            f"qk_norm_scope='full' normalises over all heads, which tensor_parallel_size={size} would cut apart; use "
            "tensor_parallel_size=1, or qk_norm_scope='head'"
        )
    if model.attention_dropout:
        raise ConfigError(
            f"attention_dropout={model.attention_dropout} would drop the same of every rank's heads with "
            f"tensor_parallel_size={size}; use attention_dropout=0 (hidden_dropout works)"
        )
    cut = {"num_key_value_heads": model.num_key_value_heads}
    if "dense" in model.mlp_layer_types:
        cut["intermediate_size"] = model.intermediate_size
    if model.num_sparse_layers and model.shared_expert_intermediate_size:
        cut["shared_expert_intermediate_size"] = model.shared_expert_intermediate_size
    largest = math.gcd(*cut.values())
    fitting = ", ".join(str(divisor) for divisor in range(1, largest + 1) if largest % divisor == 0)
    for name, value in cut.items():
        if value % size:
            raise ConfigError(f"{name}={value} cannot be split over tensor_parallel_size={size}; use one of {fitting}")


def check_tensor_parallel_run(config: Config, *, compiles: bool, fp8: bool, trains: bool) -> None:
    """Refuse flags that do not go with tensor parallelism.

    Raises:
        ConfigError: with the first mistake found.
    """
    size = parallel_sizes(config).tensor
    if size == 1:
        return
    for flag, is_set in (("--torch_compile", compiles), ("--fp8", fp8)):
        if is_set:
            raise ConfigError(f"{flag} does not work with tensor_parallel_size={size}; leave one of them away")
    if not trains:
        raise ConfigError(
            f"--do_eval without --do_train does not work with tensor_parallel_size={size}; use tensor_parallel_size=1"
        )


def _check_section(config: Config, size: int) -> None:
    section = get_section(config, "tensor_parallel")
    for key, value in section.items():
        if key not in _SIZE_KEYS:
            raise mistake(
                f"tensor_parallel.{key}", value, "must be left out: moe_hf tells AutoTP what to cut of its models"
            )
    if (inner := section.get("tp", {})) not in ({}, {"tp_size": size}):
        raise mistake("tensor_parallel.tp", inner, "must be left out: autotp_size says all")
    etp = lookup(config, "expert_parallel.expert_tensor_parallel_size", 1)
    if etp != 1:
        raise mistake("expert_parallel.expert_tensor_parallel_size", etp, "is not possible: experts stay whole; use 1")


def _check_zero(config: Config, with_tensor: str) -> None:
    if zero_stage(config) == 0:
        raise ConfigError(
            f"zero_optimization.stage=0 does not work {with_tensor}: ranks would not agree on steps to be skipped; use "
            "stage 1, 2 or 3"
        )
    for key, off in _OTHER_SLICES.items():
        if (value := lookup(config, key, off)) != off:
            raise mistake(key, value, f"does not work {with_tensor}; delete it")
    for key in ("offload_optimizer", "offload_param"):
        device = lookup(config, f"zero_optimization.{key}.device", "none")
        if device != "none":
            wanted = f"does not work {with_tensor}; delete {key}, or leave tensor parallelism out"
            raise mistake(f"zero_optimization.{key}.device", device, wanted)
    if "grad_accum_dtype" in get_section(config, "data_types") and zero_stage(config) == 1:
        dtype = lookup(config, "data_types.grad_accum_dtype", None)
        raise mistake("data_types.grad_accum_dtype", dtype, f"does not work {with_tensor} at ZeRO 1; use stage 2")
