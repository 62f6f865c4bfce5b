"""Refuse, before any process group starts, a DeepSpeed JSON that would fail late or train something else.

`deepspeed_schema` compares the file with DeepSpeed; this module compares it with the run: the world size, the model's
experts and the training arguments. Every refusal is one sentence: the key, its value, what would be right.
"""

from __future__ import annotations

import math
import re

from moe_hf.errors import ConfigError
from moe_hf.parallel.deepspeed_config import (
    Config,
    autoep_enabled,
    expert_parallel_size,
    get_section,
    lookup,
    mistake,
    zero_stage,
)
from moe_hf.parallel.deepspeed_schema import as_json, check_deepspeed_keys, check_deepspeed_values
from moe_hf.parallel.muon import check_muon, uses_muon
from moe_hf.parallel.offload import check_offload
from moe_hf.parallel.parallel_sizes import ParallelSizes, check_only_one, parallel_sizes
from moe_hf.parallel.placement import warn_of_groups_across_machines
from moe_hf.parallel.tensor_parallel_checks import check_tensor_parallel_json

PRESET_NAME = "moe_hf"

# Options of expert_parallel with which AutoEP would weigh and select otherwise than our router does. Patterns, because
# a newer AutoEP that adds another score or balancing option names it alike.
_ROUTING_KEYS = re.compile(r"top_k(_attr)?|score_\w+|route_\w+|routed_\w+|load_balance_\w+|num_(expert|limited)_groups")

# Options with which AutoEP would look for other modules and weights than the ones our preset describes.
_LAYOUT_KEYS = re.compile(r"preset_model|\w+_pattern|\w+_attr|expert_w\d|expert_activation|has_shared_experts")

# What these keys may say all the same, because it is what happens anyway.
_HARMLESS = {"load_balance_coeff": None, "preset_model": PRESET_NAME, "score_apply": "post"}


def check_deepspeed_config(
    config: Config,
    *,
    world_size: int,
    num_experts: int,
    num_moe_layers: int,
    router_balancing: str,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float | None,
    bf16: bool,
    fp16: bool,
    learning_rate: float | None = None,
) -> None:
    """Refuse a DeepSpeed JSON that DeepSpeed would ignore in part, or that contradicts itself, the model or the run.

    Args:
        config (`dict`): the DeepSpeed JSON, with the size from the command line already in it.
        world_size (`int`): number of ranks of the whole run.
        num_experts (`int`): experts of each sparse layer; 0 for a dense model.
        num_moe_layers (`int`): number of sparse layers.
        router_balancing (`str`): the model's method.
        per_device_train_batch_size (`int`): sequences per rank and micro-batch.
        gradient_accumulation_steps (`int`): micro-batches per optimizer step.
        max_grad_norm (`float`, *optional*): norm at which gradients are clipped; 0 or None for no clipping.
        bf16 (`bool`): whether the training arguments ask for BF16, for training or evaluation.
        fp16 (`bool`): the same for FP16.
        learning_rate (`float`, *optional*): compared with a JSON optimizer's `lr` when given.

    Raises:
        ConfigError: with the first mistake found.
    """
    check_deepspeed_keys(config)
    _check_zero(config)
    check_deepspeed_values(config)
    check_offload(config)
    _check_precision(config, bf16=bf16, fp16=fp16)
    check_only_one(config)
    check_tensor_parallel_json(config)
    num_data_ranks = parallel_sizes(config).data_parallel_size(world_size)
    # Data and expert parallelism lie within the ranks that hold the same layers.
    ranks_per_stage = _ranks_per_stage(config, world_size)
    _check_batch_sizes(config, num_data_ranks, per_device_train_batch_size, gradient_accumulation_steps)
    _check_gradient_clipping(config, max_grad_norm or 0.0)
    _check_optimizer(config, learning_rate)
    if uses_muon(config):
        check_muon(config, max_grad_norm=max_grad_norm or 0.0, fp16=fp16)
    _check_training_loop(config)
    _check_expert_parallel_is_meant(config)
    if autoep_enabled(config):
        _check_model_has_experts(config, num_experts, num_moe_layers)
        _check_tokens_choose(router_balancing)
        _check_expert_parallel_size(
            expert_parallel_size(config),
            ranks_per_stage,
            num_experts,
            "world_size" if ranks_per_stage == world_size else "world_size / pipeline_parallel_size",
        )
        _check_routing_is_ours(config)
        _check_zero_with_experts(config)
        _check_autoep_options(config, ranks_per_stage)
        warn_of_groups_across_machines(config, world_size)


def _ranks_per_stage(config: Config, world_size: int) -> int:
    return ParallelSizes(pipeline=parallel_sizes(config).pipeline).data_parallel_size(world_size)


def _check_zero(config: Config) -> None:
    if "zero_optimization" not in config:  # Accelerate insists on the section
        raise ConfigError('zero_optimization is missing; add "zero_optimization": {"stage": 1} (0, 1, 2 or 3)')
    zero_stage(config)  # refuses what is none


def _check_precision(config: Config, *, bf16: bool, fp16: bool) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    if "bfloat16" in config:  # Accelerate adds an own "bf16", beside which DeepSpeed does not look at "bfloat16"
        raise ConfigError("bfloat16 is an old name that the Trainer overrides; rename it to bf16")
    bf16_on = _precision_enabled(config, "bf16", bf16)
    fp16_on = _precision_enabled(config, "fp16", fp16)
    if bf16_on and fp16_on:
        raise ConfigError("bf16.enabled=true and fp16.enabled=true exclude each other; switch one of them off")
    if fp16_on and zero_stage(config) == 0:
        raise ConfigError(
            "fp16.enabled=true at ZeRO stage 0: DeepSpeed divides gradients by a loss scale that it has not applied; "
            "use stage 1, 2 or 3"
        )
    if bf16_on and not DeepSpeedBF16Config(**get_section(config, "bf16")).check_grad_overflow:
        raise ConfigError("bf16.check_grad_overflow=false lets NaN gradients into the weights; delete it or write true")


def _precision_enabled(config: Config, name: str, flag: bool) -> bool:
    enabled = lookup(config, f"{name}.enabled", None)
    if enabled is None:
        # Accelerate adds a missing section, but at ZeRO 3 only after the model was partitioned in FP32.
        if flag:
            raise ConfigError(
                f'{name}.enabled is missing although --{name} is set; add "{name}": {{"enabled": "auto"}}'
            )
        return False
    if enabled == "auto":
        return flag
    if not isinstance(enabled, bool):
        raise mistake(f"{name}.enabled", enabled, 'must be true, false or "auto"')
    if enabled != flag:
        raise mistake(f"{name}.enabled", enabled, f'contradicts --{name} {flag}; write "auto" or {as_json(flag)}')
    return enabled


def _check_batch_sizes(config: Config, num_data_ranks: int, micro_batch: int, accumulation: int) -> None:
    total = micro_batch * accumulation * num_data_ranks
    flags = f"--per_device_train_batch_size {micro_batch} x --gradient_accumulation_steps {accumulation}"
    _check_matches(config, "train_micro_batch_size_per_gpu", micro_batch, "--per_device_train_batch_size")
    _check_matches(config, "gradient_accumulation_steps", accumulation, "--gradient_accumulation_steps")
    _check_matches(config, "train_batch_size", total, f"{flags} x data_parallel_size {num_data_ranks} =")
    if "gradient_accumulation_steps" not in config and accumulation != 1:  # Accelerate puts a 1 there
        raise ConfigError(_missing_sentence("gradient_accumulation_steps", 1, accumulation))
    if "train_batch_size" not in config and "train_micro_batch_size_per_gpu" not in config:
        raise ConfigError('train_micro_batch_size_per_gpu is missing; add "train_micro_batch_size_per_gpu": "auto"')


def _check_gradient_clipping(config: Config, max_grad_norm: float) -> None:
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    _check_matches(config, "gradient_clipping", max_grad_norm, "--max_grad_norm")
    # The Trainer leaves clipping to DeepSpeed, which clips even when its JSON does not mention it.
    if "gradient_clipping" not in config and max_grad_norm != GRADIENT_CLIPPING_DEFAULT:
        raise ConfigError(_missing_sentence("gradient_clipping", GRADIENT_CLIPPING_DEFAULT, max_grad_norm))


def _check_optimizer(config: Config, learning_rate: float | None) -> None:
    if "optimizer" in config and not isinstance(lookup(config, "optimizer.type", None), str):
        raise ConfigError('optimizer.type is missing, without which DeepSpeed ignores the section; add "type": "AdamW"')
    if learning_rate is not None:
        _check_matches(config, "optimizer.params.lr", learning_rate, "--learning_rate")


def _check_training_loop(config: Config) -> None:
    """Refuse what belongs to another training loop than the Trainer's."""
    if "scheduler" in config:  # and with a warm-up of 0 steps DeepSpeed's own schedulers raise
        raise ConfigError("scheduler must be left out; use the flags --lr_scheduler_type and --warmup_steps instead")
    if lookup(config, "managed_gradient_accumulation", True) is not True:
        raise ConfigError("managed_gradient_accumulation=false does not work under the Trainer; delete it")
    if lookup(config, "gradient_allreduce_op", "mean") != "mean":
        wanted = 'scales the gradients by the number of ranks, which the Trainer already does; write "mean"'
        raise mistake("gradient_allreduce_op", config["gradient_allreduce_op"], wanted)


def _check_expert_parallel_is_meant(config: Config) -> None:
    section = get_section(config, "expert_parallel")
    if section and "enabled" not in section:
        raise ConfigError('expert_parallel has no effect without "enabled": true; add it or delete the section')


def _check_model_has_experts(config: Config, num_experts: int, num_moe_layers: int) -> None:
    if num_experts < 1 or num_moe_layers < 1:
        raise ConfigError(
            f"expert_parallel_size={expert_parallel_size(config)} needs a model with experts, but this one has"
            f" num_experts={num_experts} and {num_moe_layers} sparse layers; use expert_parallel_size=0"
        )


def _check_tokens_choose(router_balancing: str) -> None:
    if router_balancing == "expert_choice":
        raise ConfigError(
            "router_balancing='expert_choice' does not fit AutoEP, which sends every token to the same number of "
            "experts; use expert_parallel_size=0 (ZeRO 1, 2 or 3)"
        )


def _check_expert_parallel_size(ep_size: int, num_ranks: int, num_experts: int, named: str) -> None:
    fitting = math.gcd(num_ranks, num_experts)
    sizes = _either([size for size in range(1, fitting + 1) if fitting % size == 0])
    if ep_size > num_ranks:
        raise ConfigError(f"expert_parallel_size={ep_size} is larger than {named}={num_ranks}; use {sizes}")
    if num_experts % ep_size:
        raise ConfigError(f"num_experts={num_experts} cannot be split over expert_parallel_size={ep_size}; use {sizes}")
    if num_ranks % ep_size:
        raise ConfigError(f"{named}={num_ranks} is no multiple of expert_parallel_size={ep_size}; use {sizes}")


def _check_routing_is_ours(config: Config) -> None:
    for key, value in config["expert_parallel"].items():
        if key in _HARMLESS and value == _HARMLESS[key]:
            continue
        if _ROUTING_KEYS.fullmatch(key):
            raise mistake(f"expert_parallel.{key}", value, "must be left out: routing is set in the model config")
        if _LAYOUT_KEYS.fullmatch(key):
            wanted = f'must be left out: the preset "{PRESET_NAME}" describes the model\'s layers'
            raise mistake(f"expert_parallel.{key}", value, wanted)


def _check_zero_with_experts(config: Config) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stage, zero = zero_stage(config), DeepSpeedZeroConfig(**config["zero_optimization"])
    if stage == 0:  # upstream's gradient norm is wrong there, and clipping scales by it
        raise ConfigError("zero_optimization.stage=0 clips wrongly with expert parallelism; use ZeRO 1, 2 or 3")
    wanted = "does not work at ZeRO 3 with expert parallelism; delete it"
    if stage == 3 and zero.zero_quantized_gradients:
        raise mistake("zero_optimization.zero_quantized_gradients", True, wanted)
    if stage == 3 and zero.zero_hpz_partition_size > 1:
        raise mistake("zero_optimization.zero_hpz_partition_size", zero.zero_hpz_partition_size, wanted)


def _check_autoep_options(config: Config, world_size: int) -> None:
    """Let DeepSpeed judge the options of its expert-parallel layer (exchange, kernels) that we do not restrict."""
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config

    # Without our preset's name, which DeepSpeed learns only when the engine is built.
    section = {key: value for key, value in config["expert_parallel"].items() if key != "preset_model"}
    if not set(section) - {"enabled", "autoep_size"}:
        return  # nothing is left to judge, and DeepSpeed would warn about size 1 once more
    try:
        tensor = parallel_sizes(config).tensor
        validate_autoep_config(parse_autoep_config(section), world_size, 1, tensor, 1, zero_stage=zero_stage(config))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"expert_parallel is not accepted by DeepSpeed: {error}") from None


def _check_matches(config: Config, key: str, wanted: float, flag: str) -> None:
    value = lookup(config, key, "auto")
    if value == "auto" or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted):
        return
    raise mistake(key, value, f'contradicts {flag} {wanted}; write "auto" or {wanted}')


def _missing_sentence(key: str, default: float, wanted: float) -> str:
    return f'{key} is missing, so that {default} would be used instead of {wanted}; add "{key}": "auto"'


def _either(values: list[int]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
