"""Refuse, before any process group starts, what a pipeline cannot do, and name the nearest thing that it can."""

import argparse

from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from ..parallel.deepspeed_config import Config, autoep_enabled, get_section, lookup, mistake, zero_stage
from ..parallel.deepspeed_schema import as_json
from ..parallel.muon import uses_muon
from ..parallel.parallel_sizes import parallel_sizes
from ..parallel.pipeline_layout import PARTITIONS, plan_pipeline


def check_pipeline(deepspeed_json: Config, config: MoEConfig, namespace: argparse.Namespace) -> None:
    """Check a run with `pipeline.stages` above 1; others pass.

    Args:
        deepspeed_json: with the sizes from the command line.
        config: of the model.
        namespace: the parsed command line.

    Raises:
        ConfigError: with the first thing found that does not go with a pipeline.
    """
    sizes = parallel_sizes(deepspeed_json)
    if sizes.pipeline == 1:
        return
    named = f"pipeline_parallel_size={sizes.pipeline}"
    if sizes.pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"{named} is more than num_hidden_layers={config.num_hidden_layers}, and a stage without a layer has "
            f"nothing to do; use at most {config.num_hidden_layers}."
        )
    _check_zero(named, deepspeed_json)
    _check_optimizer(named, deepspeed_json)
    _check_section(deepspeed_json)
    _check_flags(named, namespace)
    if autoep_enabled(deepspeed_json) and config.num_sparse_layers:
        _check_experts_on_every_stage(named, deepspeed_json, config, sizes.pipeline)


def _check_zero(named: str, deepspeed_json: Config) -> None:
    stage = zero_stage(deepspeed_json)
    if stage > 1:
        raise ConfigError(
            f"{named} does not go with zero_optimization.stage={stage}: DeepSpeed's pipeline engine keeps "
            "the gradients of all micro-batches whole; use stage 1."
        )
    if stage == 0:
        raise ConfigError(
            f"{named} at zero_optimization.stage=0 would clip each stage by its own gradient norm; use stage 1."
        )
    for key in ("offload_optimizer", "offload_param"):
        if (device := lookup(deepspeed_json, f"zero_optimization.{key}.device", "none")) != "none":
            raise ConfigError(
                f"{named} does not go with zero_optimization.{key}.device={as_json(device)}, which is untested there; "
                f"delete {key}, or use ZeRO 2 or 3 without a pipeline."
            )


def _check_optimizer(named: str, deepspeed_json: Config) -> None:
    if uses_muon(deepspeed_json):
        raise ConfigError(f"{named} does not go with optimizer.type=Muon, which is untested there; use --optim.")
    if (dtype := lookup(deepspeed_json, "data_types.grad_accum_dtype", None)) is not None:
        raise ConfigError(
            f"{named} does not go with data_types.grad_accum_dtype={as_json(dtype)}, untested there; delete it."
        )


def _check_section(deepspeed_json: Config) -> None:
    section = get_section(deepspeed_json, "pipeline")
    partition = section.get("partition", "best")
    if partition not in PARTITIONS:
        raise mistake("pipeline.partition", partition, 'must be "uniform" or "parameters"')
    if section.get("activation_checkpoint_interval", 0):
        interval = section["activation_checkpoint_interval"]
        raise mistake(
            "pipeline.activation_checkpoint_interval", interval, "must be 0; --gradient_checkpointing True does it"
        )
    if section.get("seed_layers", False):
        raise mistake("pipeline.seed_layers", True, "would draw noise anew in every layer; delete it")


def _check_flags(named: str, namespace: argparse.Namespace) -> None:
    refused = {
        "fp16": (namespace.fp16, "--bf16 True"),
        "fp8": (namespace.fp8, "--bf16 True alone"),
        "torch_compile": (namespace.torch_compile, "no --torch_compile"),
        "streaming": (namespace.streaming, "shards of `moe-hf tokenize` (--tokenized_data)"),
        "freeze_router": (namespace.freeze_router, "no --freeze_router"),
        "router_learning_rate_multiplier": (namespace.router_learning_rate_multiplier != 1, "1"),
        "router_weight_decay": (namespace.router_weight_decay is not None, "--weight_decay for all"),
        "include_num_input_tokens_seen": (
            namespace.include_num_input_tokens_seen not in ("no", False),
            "num_tokens, which every log entry has",
        ),
        f"train_sampling_strategy {namespace.train_sampling_strategy}": (
            namespace.train_sampling_strategy not in ("random", "sequential"),
            "random or sequential",
        ),
        "auto_find_batch_size": (namespace.auto_find_batch_size, "--per_device_train_batch_size"),
        "load_best_model_at_end": (namespace.load_best_model_at_end, "the checkpoint that the log names"),
    }
    for flag, (is_set, instead) in refused.items():
        if is_set:
            raise ConfigError(f"{named} does not go with --{flag}; use {instead}.")
    if not namespace.average_tokens_across_devices:
        raise ConfigError(
            f"{named} needs --average_tokens_across_devices True, which counts tokens over all pipelines."
        )


def _check_experts_on_every_stage(named: str, deepspeed_json: Config, config: MoEConfig, num_stages: int) -> None:
    """Refuse stages on which AutoEP would find nothing to convert, and ends the run."""
    partition = lookup(deepspeed_json, "pipeline.partition", "best")
    layout = plan_pipeline(config, num_stages, num_stages, partition)
    for stage in range(num_stages):
        layers = layout.layers(stage)
        if all(config.mlp_layer_types[layer] == "dense" for layer in layers):
            raise ConfigError(
                f"{named} with expert parallelism needs a sparse layer on every stage, but stage {stage} has layers "
                f"{layers.start} to {layers.stop - 1}, which are dense; use fewer stages or --expert_parallel_size 0."
            )
