"""The order of the work of run_clm_moe.py: check everything, then build, train, evaluate and export."""

import os
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..checkpoint.manifest import EXPORT_NAME
from ..checkpoint.topology import Topology
from ..configuration_moe import MoEConfig
from ..data.arguments import DataArguments
from ..data.build import build_datasets, resolve_block_size
from ..data.collator import CausalLMCollator
from ..data.corpus import load_or_train_tokenizer
from ..data.streaming import TokenStream
from ..errors import ConfigError, DataError, UserError
from ..modeling_moe import MoEForCausalLM
from ..parallel.build_locks import remove_stale_build_locks
from ..parallel.deepspeed_config import (
    lookup,
)
from ..parallel.engine import join_process_group
from ..parallel.failure import FailureRelay
from ..parallel.nvme_optimizer import prepare_nvme
from ..parallel.parallel_sizes import parallel_sizes
from ..parallel.processes import raise_together
from ..parallel.sequence_parallel import check_block_size
from ..parallel.shared_memory import remove_shared_buffers
from ..parallel.tensor_parallel import loading_whole_weights, with_split_plan
from .arguments import ModelArguments, MoETrainingArguments, construct
from .card_data import describe_data
from .checked_run import check_command_line, tokenizer_name
from .converted_weights import loadable_folder
from .output_folder import RemoveEarlierRun
from .pipeline_model import build_pipelined_model
from .pipeline_trainer import PipelineTrainer
from .stream_training import lay_out
from .trainer import MoETrainer
from .vocabulary import never_generate_padding

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
    run = check_command_line(argv, description)
    namespace, model_args, data_args, config = run.namespace, run.model_args, run.data_args, run.config
    deepspeed_json, topology, choice = run.deepspeed_json, run.topology, run.choice

    replaced = {"deepspeed": deepspeed_json, "sequence_parallel_size": topology.sequence_parallel_size}
    if deepspeed_json is not None:
        replaced["deepspeed"] = with_split_plan(deepspeed_json)
        _remove_what_killed_runs_have_left()
        replaced["deepspeed"] = prepare_nvme(replaced["deepspeed"])
    try:
        args = construct(MoETrainingArguments, namespace, **replaced)
    finally:
        # Also when it fails, because by then it may have started the process group.
        relay.watch()
    if args.accelerator_config.dispatch_batches and topology.tensor_parallel_size > 1:
        raise ConfigError(
            "accelerator_config dispatch_batches=true would give all ranks the same rows with tensor_parallel_size="
            f"{topology.tensor_parallel_size}; leave it out."
        )
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
    check_block_size(block_size, topology.sequence_parallel_size)
    train_dataset, eval_dataset = _load_data(args, data_args, tokenizer, config, block_size, topology)
    if weights is not None:
        with args.main_process_first(desc="weights"):
            weights = loadable_folder(weights, data_args.cache_dir)
    model = _build_model(model_args, weights, config, tokenizer, deepspeed_json)
    # Nothing is written or deleted before all ranks have found everything well.
    raise_together(None)
    try:
        trainer = (PipelineTrainer if topology.pipeline_parallel_size > 1 else MoETrainer)(
            topology=topology,
            data=describe_data(data_args, block_size, do_eval=args.do_eval) if args.do_train else None,
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=CausalLMCollator(tokenizer.pad_token_id or 0, topology.sequence_parallel_size),
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


def _load_tokenizer(
    args: MoETrainingArguments, model_args: ModelArguments, data_args: DataArguments, config: MoEConfig
) -> PreTrainedTokenizerBase:
    name = tokenizer_name(model_args, data_args)
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


def _load_data(
    args: MoETrainingArguments,
    data_args: DataArguments,
    tokenizer,
    config: MoEConfig,
    block_size: int,
    topology: Topology,
):
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
        lay_out(train, args, data_args.streaming_partitions, topology.num_data_ranks)
    return train, validation


def _build_model(
    model_args: ModelArguments,
    weights: str | Path | None,
    config: MoEConfig,
    tokenizer: PreTrainedTokenizerBase,
    deepspeed_json: dict | None,
) -> torch.nn.Module:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    implementations = {
        "attn_implementation": model_args.attn_implementation,
        "experts_implementation": model_args.experts_implementation,
    }
    implementations = {name: value for name, value in implementations.items() if value is not None}
    sizes = parallel_sizes(deepspeed_json)
    try:
        if sizes.pipeline > 1:
            partition = lookup(deepspeed_json, "pipeline.partition", "best")
            model = build_pipelined_model(config, weights, sizes, partition, implementations)
            if weights is None and model_args.pad_vocab_to_multiple_of is not None:
                never_generate_padding(model, len(tokenizer))
            return model
        if weights is None:
            model = MoEForCausalLM._from_config(config, dtype=torch.float32, **implementations)
            if model_args.pad_vocab_to_multiple_of is not None:
                never_generate_padding(model, len(tokenizer))
            return model
        with loading_whole_weights():
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
