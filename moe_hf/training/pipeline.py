"""The order of the work of run_clm_moe.py: check everything, then build, train, export and evaluate.

Whatever can be wrong is looked for before `TrainingArguments` starts the process group, because from then on an error
of one process has to be carried to the others.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..checkpoint.manifest import EXPORT_NAME
from ..checkpoint.topology import Topology
from ..configuration_moe import MoEConfig
from ..data.arguments import DataArguments, check_data_arguments
from ..data.build import build_datasets, resolve_block_size
from ..data.collator import CausalLMCollator
from ..data.corpus import load_or_train_tokenizer
from ..data.streaming import TokenStream
from ..data.tokenized_folder import TOKENIZER_NAME
from ..errors import ConfigError, DataError, UserError
from ..modeling_moe import MoEForCausalLM
from ..parallel.build_locks import remove_stale_build_locks
from ..parallel.deepspeed_checks import check_deepspeed_config
from ..parallel.deepspeed_config import (
    expert_parallel_size,
    read_deepspeed_json,
    zero_stage,
)
from ..parallel.deepspeed_schema import check_deepspeed_keys
from ..parallel.engine import join_process_group
from ..parallel.failure import FailureRelay
from ..parallel.nvme_checks import check_nvme
from ..parallel.nvme_optimizer import prepare_nvme
from ..parallel.parallel_sizes import parallel_sizes
from ..parallel.processes import raise_together, world_size
from ..parallel.shared_memory import remove_shared_buffers
from ..parallel.versions import require_supported
from .arguments import ModelArguments, MoETrainingArguments, construct, parse_arguments
from .card_data import describe_data
from .converted_weights import loadable_folder
from .flash_attention import choose_attention
from .hub_push import check_hub_arguments
from .model_config import build_config, check_weights, local_model
from .optimizer_choice import optimizer_family
from .output_folder import RemoveEarlierRun, check_output_folder
from .parallel_arguments import check_deepspeed_is_there, with_flags
from .precision_arguments import has_fp16
from .resuming import ResumeChoice
from .router_optimizer import router_grouping
from .schedule_checks import check_schedule
from .stream_training import check_streaming, lay_out
from .trainer import MoETrainer
from .vocabulary import never_generate_padding, pad_vocabulary

logger = logging.get_logger(__name__)


def train_and_export(argv: list[str], relay: FailureRelay, description: str | None = None) -> dict[str, float]:
    """Do what the command line says; return the metrics of training and evaluation.

    Raises:
        UserError: anything that the user can correct.
    """
    trainer = build_trainer(argv, relay, description)
    metrics = execute(trainer)
    if trainer.args.push_to_hub:
        # An upload may take longer than processes wait for each other: the others may go.
        relay.stop()
        trainer.push_to_hub()
    return metrics


def build_trainer(argv: list[str], relay: FailureRelay, description: str | None = None) -> MoETrainer:
    """Check the command line and build everything it names.

    Args:
        argv: the words after the script's name.
        relay: watches the other processes as soon as there is a process group.
        description: shown by `--help`.
    """
    namespace = parse_arguments(argv, description)
    model_args = construct(ModelArguments, namespace)
    data_args = construct(DataArguments, namespace)
    _check_flags(namespace)
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = local_model(model_args.model_name_or_path)
    pad_vocabulary(model_args, _tokenizer_name(model_args, data_args))
    config = build_config(model_args)
    if model_args.model_name_or_path is not None:
        check_weights(model_args.model_name_or_path, config)
    in_16_bits = namespace.bf16 or namespace.fp16
    model_args.attn_implementation = choose_attention(model_args.attn_implementation, config, in_16_bits)
    deepspeed_json = _checked_deepspeed_json(namespace, config)
    topology = _topology(namespace, config, deepspeed_json)
    check_data_arguments(data_args)
    check_streaming(namespace, data_args)
    check_output_folder(namespace)
    choice = ResumeChoice(namespace, topology, config)

    replaced = {"deepspeed": deepspeed_json}
    if deepspeed_json is not None:
        _remove_what_killed_runs_have_left()
        replaced["deepspeed"] = prepare_nvme(deepspeed_json)
    try:
        args = construct(MoETrainingArguments, namespace, **replaced)
    finally:
        # Also when it fails, because by then it may have started the process group.
        relay.watch()
    if args.n_gpu > 1:
        raise ConfigError(f"One process cannot use {args.n_gpu} GPUs; start with: deepspeed run_clm_moe.py ….")
    if deepspeed_json is not None:
        join_process_group()
    set_seed(args.seed)

    checkpoint = choice.verified()
    weights = model_args.model_name_or_path
    if checkpoint is not None and args.reset_optimizer:
        weights = checkpoint / EXPORT_NAME
    args.resume_from_checkpoint = None if checkpoint is None or args.reset_optimizer else str(checkpoint)

    tokenizer = _load_tokenizer(args, model_args, data_args, config)
    block_size = resolve_block_size(data_args, tokenizer, config.max_position_embeddings)
    train_dataset, eval_dataset = _load_data(args, data_args, tokenizer, config, block_size)
    if weights is not None:
        with args.main_process_first(desc="weights"):
            weights = loadable_folder(weights, data_args.cache_dir)
    model = _build_model(model_args, weights, config, tokenizer)
    # Nothing is written or deleted before all ranks have found everything well.
    raise_together(None)
    try:
        trainer = MoETrainer(
            topology=topology,
            data=describe_data(data_args, block_size, do_eval=args.do_eval) if args.do_train else None,
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=CausalLMCollator(pad_token_id=tokenizer.pad_token_id or 0),
            processing_class=tokenizer,
        )
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    if args.overwrite_output_dir and checkpoint is None:
        trainer.add_callback(RemoveEarlierRun)
    return trainer


def _remove_what_killed_runs_have_left() -> None:
    """Clear away what DeepSpeed would wait for, or take for its own, from one process of each machine.

    Nobody compiles or opens a buffer before the process group exists, and that waits for this process.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_stale_build_locks()
        # They have the same names when a run is started again on the same port.
        remove_shared_buffers()


def execute(trainer: MoETrainer) -> dict[str, float]:
    """Train, evaluate and export, as far as `trainer.args` say so; return all metrics."""
    metrics = {}
    if trainer.args.do_train:
        metrics |= _train(trainer)
    if trainer.args.do_eval:
        metrics |= _evaluate(trainer)
    if trainer.args.do_train:
        # After the evaluation, so that the model card can tell its result.
        trainer.save_model()
    return metrics


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
    if namespace.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor={namespace.label_smoothing_factor} is not supported: the loss is the model's own; "
            "leave it at 0."
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


def _tokenizer_name(model_args: ModelArguments, data_args: DataArguments) -> str | None:
    if data_args.tokenizer_name or model_args.model_name_or_path or data_args.tokenized_data is None:
        return data_args.tokenizer_name or model_args.model_name_or_path
    return os.path.join(os.path.expanduser(data_args.tokenized_data), TOKENIZER_NAME)


def _load_tokenizer(
    args: MoETrainingArguments, model_args: ModelArguments, data_args: DataArguments, config: MoEConfig
) -> PreTrainedTokenizerBase:
    name = _tokenizer_name(model_args, data_args)
    sources = (data_args.train_file, data_args.validation_file, data_args.dataset_name, data_args.dataset_mixture)
    if name is None and any(sources):
        logger.warning_once(
            "No --tokenizer_name: using the tokenizer of the embedded corpus, trained on Python source."
        )
    with args.main_process_first(desc="tokenizer"):
        try:
            if name is None:
                tokenizer = load_or_train_tokenizer(data_args.cache_dir, config.vocab_size)
            else:
                tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DataError(f"The tokenizer {name or 'of the embedded corpus'} cannot be loaded: {error}") from None
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {config.vocab_size}; "
            f"add --config_overrides vocab_size={-(-len(tokenizer) // 128) * 128}."
        )
    return tokenizer


def _load_data(args: MoETrainingArguments, data_args: DataArguments, tokenizer, config: MoEConfig, block_size: int):
    train, validation = build_datasets(
        data_args,
        tokenizer,
        block_size=block_size,
        vocab_size=config.vocab_size,
        do_train=args.do_train,
        do_eval=args.do_eval,
        seed=args.seed,
        is_main_process_first_context=args.main_process_first(desc="data"),
    )
    if isinstance(train, TokenStream):
        lay_out(train, args, data_args.streaming_partitions)
    return train, validation


def _build_model(
    model_args: ModelArguments, weights: str | Path | None, config: MoEConfig, tokenizer: PreTrainedTokenizerBase
) -> MoEForCausalLM:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    implementations = {
        "attn_implementation": model_args.attn_implementation,
        "experts_implementation": model_args.experts_implementation,
    }
    implementations = {name: value for name, value in implementations.items() if value is not None}
    try:
        if weights is None:
            model = MoEForCausalLM._from_config(config, dtype=torch.float32, **implementations)
            if model_args.pad_vocab_to_multiple_of is not None:
                never_generate_padding(model, len(tokenizer))
            return model
        return MoEForCausalLM.from_pretrained(
            weights, config=config, dtype=torch.float32, use_safetensors=True, **implementations
        )
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"The model cannot be built: {' '.join(str(error).split())}") from error


def _train(trainer: MoETrainer) -> dict[str, float]:
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    metrics = dict(result.metrics)
    trainer.log_metrics("train", _of_all_layers(metrics))
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def _evaluate(trainer: MoETrainer) -> dict[str, float]:
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", _of_all_layers(metrics))
    trainer.save_metrics("eval", metrics)
    return metrics


def _of_all_layers(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out what is said of single layers, which the tables of evaluations show."""
    return {name: value for name, value in metrics.items() if "/" not in name}
