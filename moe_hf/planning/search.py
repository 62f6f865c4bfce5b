"""Which settings fit, and which of them is the fastest by estimate: ZeRO x EP x TP x micro-batch."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from ..parallel.deepspeed_checks import check_deepspeed_config
from ..parallel.deepspeed_config import Config, with_expert_parallel_size
from ..parallel.parallel_sizes import with_parallel_sizes
from ..parallel.tensor_parallel_checks import check_tensor_parallel_model
from .hardware import Hardware
from .plan import Plan, make_plan
from .setting import read_setting

_STAGES = (1, 2, 3)
_TENSOR_PARALLEL = (1, 2, 4, 8)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)

# As the JSONs in ds_configs/ have it: DeepSpeed's own bucket takes a gigabyte.
_BUCKET = 50_000_000


@dataclass(frozen=True)
class Candidate:
    """A setting that fits: the DeepSpeed JSON that makes it, and its plan."""

    config: Config
    plan: Plan


def search(
    config: MoEConfig,
    world_size: int,
    hardware: Hardware,
    gpu_memory: float | None,
    precision: str,
    *,
    sequences_per_step: int,
    micro_batch: int | None = None,
    efficiency: float,
    **batch,
) -> list[Candidate]:
    """Return all settings that fit, the one with the least estimated time per token first.

    Only what `check_deepspeed_config` accepts is looked at, so that the JSON of each can be trained with.

    Args:
        config: of the model.
        world_size: number of GPUs.
        hardware: on what.
        gpu_memory: of one GPU in GB, if it is not what the hardware has.
        precision: of training.
        sequences_per_step: of all ranks, in one optimizer step.
        micro_batch: the only one to look at, if it is given.
        efficiency: share of the GPU's peak that computation reaches.
        **batch: other fields of `Setting`.
    """
    found = []
    micro_batches = _MICRO_BATCHES if micro_batch is None else (micro_batch,)
    for deepspeed_json in _layouts(config, world_size, precision):
        for size in micro_batches:
            setting = read_setting(deepspeed_json, config.hidden_size, world_size, precision, micro_batch=size, **batch)
            accumulation, rest = divmod(sequences_per_step, size * setting.data_parallel_size)
            if rest or not accumulation:
                continue
            # Both as numbers, so that flags that do not fit them are refused.
            sizes = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": accumulation}
            plan = make_plan(config, replace(setting, accumulation=accumulation), hardware, gpu_memory, efficiency)
            if plan.fits:
                found.append(Candidate(deepspeed_json | sizes, plan))
    # Of those that are as fast, as far as such an estimate tells, the one that needs least.
    return sorted(found, key=lambda c: (float(f"{c.plan.time.seconds:.3g}"), c.plan.peak))


def _layouts(config: MoEConfig, world_size: int, precision: str) -> Iterator[Config]:
    """Yield a DeepSpeed JSON for each stage and size of parallelism that is not refused."""
    expert_sizes = [0]
    if config.num_sparse_layers:
        expert_sizes += [n for n in range(1, world_size + 1) if world_size % n == 0 and config.num_experts % n == 0]
    for stage, ep_size, tp_size in itertools.product(_STAGES, expert_sizes, _TENSOR_PARALLEL):
        if world_size % tp_size or config.num_key_value_heads % tp_size:
            continue
        deepspeed_json = with_parallel_sizes(_template(stage), tensor=tp_size)
        if ep_size:
            deepspeed_json = with_expert_parallel_size(deepspeed_json, ep_size)
        if _is_accepted(deepspeed_json, config, world_size, precision):
            yield deepspeed_json


def _template(stage: int) -> Config:
    zero = {"stage": stage, "use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": _BUCKET}
    if stage == 3:
        zero = {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def _is_accepted(deepspeed_json: Config, config: MoEConfig, world_size: int, precision: str) -> bool:
    try:
        check_setting(deepspeed_json, config, world_size, precision)
    except ConfigError:
        return False
    return True


def check_setting(
    deepspeed_json: Config,
    config: MoEConfig,
    world_size: int,
    precision: str,
    micro_batch: int = 1,
    accumulation: int = 1,
) -> None:
    """Refuse a DeepSpeed JSON that a run would refuse too.

    Raises:
        ConfigError: with the first mistake found.
    """
    check_deepspeed_config(
        deepspeed_json,
        world_size=world_size,
        num_experts=config.num_experts,
        num_moe_layers=config.num_sparse_layers,
        router_balancing=config.router_balancing,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=_clipping(deepspeed_json),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )
    check_tensor_parallel_model(deepspeed_json, config)


def _clipping(deepspeed_json: Config) -> float:
    """Return a norm that the JSON does not contradict; plans do not depend on it."""
    value = deepspeed_json.get("gradient_clipping", "auto")
    return value if isinstance(value, (int, float)) else 1.0
