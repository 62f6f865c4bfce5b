"""Look for everything that can be wrong with a command line before there is a process group.

From then on an error of one process has to be carried to the others, so whatever one process can find out alone is
found here.
"""

import argparse
import os
from dataclasses import asdict, dataclass

import torch

from ..checkpoint.topology import Topology
from ..configuration_moe import MoEConfig
from ..data.arguments import DataArguments, check_data_arguments
from ..data.tokenized_folder import TOKENIZER_NAME
from ..errors import ConfigError
from ..parallel.deepspeed_checks import check_deepspeed_config
from ..parallel.deepspeed_config import (
    expert_parallel_size,
    read_deepspeed_json,
    zero_stage,
)
from ..parallel.deepspeed_schema import check_deepspeed_keys
from ..parallel.nvme_checks import check_nvme
from ..parallel.parallel_sizes import parallel_sizes
from ..parallel.processes import world_size
from ..parallel.sequence_parallel import as_data_parallel, check_block_size, check_sequence_parallel
from ..parallel.tensor_parallel_checks import check_tensor_parallel_model, check_tensor_parallel_run
from ..parallel.versions import require_supported
from .arguments import ModelArguments, construct, parse_arguments
from .experts_kernel import choose_experts
from .flash_attention import choose_attention
from .hub_push import check_hub_arguments
from .model_config import build_config, check_weights, local_model
from .optimizer_choice import optimizer_family
from .output_folder import check_output_folder
from .parallel_arguments import check_deepspeed_is_there, with_flags
from .pipeline_checks import check_pipeline
from .precision_arguments import has_fp16
from .resuming import ResumeChoice
from .router_optimizer import router_grouping
from .schedule_checks import check_schedule
from .sequence_parallel import check_sequence_flags
from .stream_training import check_streaming
from .vocabulary import pad_vocabulary


@dataclass(frozen=True)
class CheckedRun:
    """A command line in which nothing is wrong that one process can find out alone."""

    namespace: argparse.Namespace
    model_args: ModelArguments
    data_args: DataArguments
    config: MoEConfig
    deepspeed_json: dict | None
    topology: Topology
    choice: ResumeChoice


def check_command_line(argv: list[str], description: str | None = None) -> CheckedRun:
    """Look for everything that can be wrong before there is a process group.

    Args:
        argv: the words after the script's name.
        description: shown by `--help`.

    Raises:
        UserError: with the first mistake found.
    """
    namespace = parse_arguments(argv, description)
    model_args = construct(ModelArguments, namespace)
    data_args = construct(DataArguments, namespace)
    _check_flags(namespace)
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = local_model(model_args.model_name_or_path)
    pad_vocabulary(model_args, tokenizer_name(model_args, data_args))
    config = build_config(model_args)
    if model_args.model_name_or_path is not None:
        check_weights(model_args.model_name_or_path, config)
    in_16_bits = namespace.bf16 or namespace.fp16
    model_args.attn_implementation = choose_attention(model_args.attn_implementation, config, in_16_bits)
    deepspeed_json = _checked_deepspeed_json(namespace, config)
    model_args.experts_implementation = choose_experts(
        model_args.experts_implementation,
        in_bfloat16=namespace.bf16,
        in_autoep=deepspeed_json is not None and expert_parallel_size(deepspeed_json) > 0,
    )
    topology = _topology(namespace, config, deepspeed_json)
    check_data_arguments(data_args)
    sizes = parallel_sizes(deepspeed_json)
    check_streaming(namespace, data_args, topology.num_data_ranks)
    check_sequence_flags(namespace, sizes.sequence)
    if deepspeed_json is not None:
        check_sequence_parallel(deepspeed_json, config, model_args.attn_implementation)
        deepspeed_json = as_data_parallel(deepspeed_json)
    if data_args.block_size is not None:
        check_block_size(data_args.block_size, sizes.sequence)
    check_output_folder(namespace)
    choice = ResumeChoice(namespace, topology, config)
    return CheckedRun(namespace, model_args, data_args, config, deepspeed_json, topology, choice)


def _checked_deepspeed_json(namespace: argparse.Namespace, config: MoEConfig) -> dict | None:
    if namespace.deepspeed is None:
        check_deepspeed_is_there(namespace)
        return None
    if "RANK" not in os.environ:
        raise ConfigError("--deepspeed needs several processes or one from its launcher: deepspeed run_clm_moe.py ….")
    try:
        for package in ("deepspeed", "transformers"):
            require_supported(package)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    deepspeed_json = read_deepspeed_json(namespace.deepspeed)
    check_deepspeed_keys(deepspeed_json)
    deepspeed_json = with_flags(deepspeed_json, namespace)
    check_deepspeed_config(
        deepspeed_json,
        world_size=world_size(),
        num_experts=config.num_experts,
        num_moe_layers=config.num_sparse_layers,
        router_balancing=config.router_balancing,
        per_device_train_batch_size=namespace.per_device_train_batch_size,
        gradient_accumulation_steps=namespace.gradient_accumulation_steps,
        max_grad_norm=namespace.max_grad_norm,
        bf16=namespace.bf16,
        fp16=namespace.fp16,
        learning_rate=namespace.learning_rate,
    )
    check_pipeline(deepspeed_json, config, namespace)
    check_tensor_parallel_model(deepspeed_json, config)
    compiles = namespace.torch_compile or namespace.torch_compile_backend or namespace.torch_compile_mode
    check_tensor_parallel_run(deepspeed_json, compiles=bool(compiles), fp8=namespace.fp8, trains=namespace.do_train)
    if parallel_sizes(deepspeed_json).pipeline > 1:
        # Which the Trainer and Accelerate would compute from the number of ranks; DeepSpeed does it from the pipelines.
        deepspeed_json.pop("train_batch_size", None)
        deepspeed_json.setdefault("train_micro_batch_size_per_gpu", "auto")
    check_nvme(deepspeed_json, config, world_size=world_size(), in_16_bits=namespace.bf16 or namespace.fp16)
    if namespace.do_eval and not namespace.do_train and zero_stage(deepspeed_json) != 3:
        raise ConfigError(
            f"--do_eval without --do_train needs ZeRO stage 3, not {zero_stage(deepspeed_json)}; "
            "use ds_configs/zero3_ep.json, or leave --deepspeed away."
        )
    return deepspeed_json


def _topology(namespace: argparse.Namespace, config: MoEConfig, deepspeed_json: dict | None) -> Topology:
    dtype = "bfloat16" if namespace.bf16 else "float16" if namespace.fp16 else "float32"
    routers = router_grouping(namespace, config, deepspeed_json)
    optimizer = optimizer_family(namespace, deepspeed_json)
    if deepspeed_json is None:
        return Topology(world_size(), 0, -1, dtype, routers, optimizer)
    sizes = {f"{name}_parallel_size": size for name, size in asdict(parallel_sizes(deepspeed_json)).items()}
    ep_size = expert_parallel_size(deepspeed_json)
    return Topology(world_size(), ep_size, zero_stage(deepspeed_json), dtype, routers, optimizer, **sizes)


def _check_flags(namespace: argparse.Namespace) -> None:
    """Refuse what `TrainingArguments` offers but this trainer does not do."""
    if not (namespace.do_train or namespace.do_eval):
        raise ConfigError("Nothing to do: give --do_train, --do_eval or both.")
    check_hub_arguments(namespace)
    check_schedule(namespace)
    if namespace.resume_from_checkpoint and namespace.train_sampling_strategy not in ("random", "sequential"):
        raise ConfigError(
            f"--train_sampling_strategy {namespace.train_sampling_strategy} orders the rows anew in each run, so that "
            "resuming would repeat some and skip others; use random or sequential."
        )
    if not 0 <= namespace.label_smoothing_factor < 1:
        raise ConfigError(
            f"label_smoothing_factor={namespace.label_smoothing_factor} must be at least 0 and below 1; 0.1 is usual."
        )
    if namespace.fsdp:
        raise ConfigError("--fsdp is not supported; ZeRO 3 does the same: --deepspeed ds_configs/zero3.json.")
    if namespace.save_on_each_node:
        raise ConfigError(
            "--save_on_each_node is not supported: all processes write into one checkpoint, so --output_dir must be on "
            "a disk that all machines share."
        )
    if namespace.enable_jit_checkpoint:
        raise ConfigError("--enable_jit_checkpoint is not needed: SIGTERM and SIGUSR1 always save a checkpoint here.")
    for name in (
        "max_skipped_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    ):
        if (value := getattr(namespace, name)) < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if namespace.fp16 and not has_fp16():
        raise ConfigError("--fp16 needs an accelerator or a CPU with 16-bit floats; use --bf16.")
    if namespace.fp16 and namespace.deepspeed is None and not torch.accelerator.is_available():
        raise ConfigError("--fp16 without DeepSpeed would compute in 32 bits on a CPU; use --bf16.")
    if not namespace.eval_do_concat_batches:
        raise ConfigError("eval_do_concat_batches=False is not supported: evaluation keeps sums, not batches.")


def tokenizer_name(model_args: ModelArguments, data_args: DataArguments) -> str | None:
    if data_args.tokenizer_name or model_args.model_name_or_path or data_args.tokenized_data is None:
        return data_args.tokenizer_name or model_args.model_name_or_path
    return os.path.join(os.path.expanduser(data_args.tokenized_data), TOKENIZER_NAME)
