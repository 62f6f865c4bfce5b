"""The Trainer: token-exact losses, complete exports, checkpoints that know their topology, no silent NaN."""

import os
from pathlib import Path

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..checkpoint.export import export_model
from ..checkpoint.model_card import active_parameters, render_model_card
from ..checkpoint.topology import TOPOLOGY_NAME, Topology, write_topology
from ..errors import CheckpointError, ConfigError, UserError
from ..parallel.deepspeed_config import autoep_enabled, expert_parallel_size, zero_stage
from ..parallel.engine import prepare_for_training, report_clipped_norm
from ..parallel.processes import raise_together
from .evaluation import compute_metrics, sample_statistics
from .metrics import ConsoleCallback, JsonLinesCallback, PlainConsoleCallback, TrainingMetrics
from .nonfinite import NonFiniteGuard, SkipCounter

EXPORT_NAME = "hf"


class TrainingStopped(UserError):
    """Training ended early on purpose; the message says why and where the last checkpoint is."""


class MoETrainer(Trainer):
    """`Trainer` for `MoEForCausalLM` under DeepSpeed, DDP or in one process.

    Args:
        topology: layout of this run, recorded in every checkpoint.
        **kwargs: of `Trainer`; `processing_class` is exported beside the weights.
    """

    def __init__(self, *, topology: Topology, **kwargs) -> None:
        super().__init__(compute_metrics=compute_metrics, **kwargs)
        self._topology = topology
        self._deepspeed_json = self.args.deepspeed if self.is_deepspeed_enabled else None
        prepare_for_training(self.model, self._deepspeed_json)
        sparse = [i for i, kind in enumerate(self.model.config.mlp_layer_types) if kind == "sparse"]
        self._metrics = TrainingMetrics(sparse, shares_are_sums=self.args.average_tokens_across_devices)
        self._skips = SkipCounter(self.args.max_skipped_steps)
        self._guard = NonFiniteGuard()
        self._stop_reason: str | None = None
        self._num_tokens_in_batch: torch.Tensor | int = 0
        self._last_counted_step = -1
        self._active_parameters = active_parameters(self.model.config)
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
                self.remove_callback(callback)
        self.add_callback(PlainConsoleCallback if self.args.disable_tqdm else ConsoleCallback)
        self.add_callback(JsonLinesCallback)

    # ---- losses ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, and count the unmasked tokens of the whole batch, which the router losses are means over."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_tokens = sum(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() for batch in batches)
        if batches and self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_tokens = self.accelerator.gather(num_tokens.to(device)).sum()
        self._num_tokens_in_batch = num_tokens
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`, with the count of tokens handed to the model and the loss's parts kept for the log."""
        inputs = {**inputs, "num_tokens_in_batch": self._num_tokens_in_batch}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._metrics.add_micro_batch(outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return statistics of every sample instead of logits; `compute_metrics` makes token-weighted means of them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        statistics = sample_statistics(outputs, inputs["labels"])
        # Trainer computes metrics only where there are labels; ours are already in the statistics.
        return None, statistics, torch.zeros_like(statistics[:, 0])

    def floating_point_ops(self, inputs) -> int:
        """6 FLOPs for each *active* matrix parameter and token, forward and backward; attention is not counted."""
        return 6 * self._active_parameters.in_matrices * inputs["input_ids"].numel()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        except Exception as error:
            if resume_from_checkpoint is None or self.deepspeed is None:
                raise  # the engine is built first: without one it was not the checkpoint
            raise _loading_failed(resume_from_checkpoint, error) from error
        if self._deepspeed_json is not None and not self._engine_checks_gradients():
            report_clipped_norm(self.model_wrapped)
        self._metrics.restart_clock()
        return prepared

    # ---- steps that are not finite ----

    def create_optimizer(self, model=None):
        """As in `Trainer`; AutoEP's experts get their own groups, and a guard looks for NaN where nobody does."""
        if self.optimizer is not None:
            return self.optimizer
        try:
            optimizer = super().create_optimizer(model)
        except ImportError as error:
            raise ConfigError(f"--optim {self.args.optim.value} needs a package: {error}") from error
        if self._deepspeed_json is not None and autoep_enabled(self._deepspeed_json):
            from ..parallel.autoep import split_expert_groups

            split_expert_groups(optimizer, self.model, expert_parallel_size(self._deepspeed_json))
        if not self._engine_checks_gradients():
            self._guard.attach(optimizer)
        return optimizer

    def _engine_checks_gradients(self) -> bool:
        config = self._deepspeed_json
        return config is not None and (zero_stage(config) > 0 or self.args.bf16 or self.args.fp16)

    def _count_step(self) -> None:
        """Count the optimizer step just made, once, and stop when too many in a row were skipped."""
        if self.state.global_step == self._last_counted_step:
            return
        self._last_counted_step = self.state.global_step
        self._metrics.add_step(self._num_tokens_in_batch)
        if self._skips.add(self._guard.skipped or self.accelerator.optimizer_step_was_skipped):
            self._stop_reason = (
                f"{self._skips.in_a_row} steps in a row had a loss or gradients that were NaN or infinite and were "
                f"skipped (step {self.state.global_step}, max_skipped_steps={self.args.max_skipped_steps}); "
                "lower the learning rate or look at the data"
            )
            self.control.should_save = True
            self.control.should_training_stop = True

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._count_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            # Trainer resets its sum by subtracting it from itself, which leaves a NaN in there for ever.
            self._tr_loss.zero_()
        if self.control.should_evaluate or self.control.should_save:
            self._metrics.restart_clock()

    def log(self, logs, start_time=None) -> None:
        """As in `Trainer`, with the loss's parts, throughput and skipped steps in every training entry."""
        if "loss" in logs:
            logs |= self._metrics.pop() | {"skipped_steps": self._skips.total}
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            TrainingStopped: too many steps in a row were not finite; a checkpoint was saved.
        """
        if (checkpoint := self.args.resume_from_checkpoint) is not None:
            try:
                TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            except Exception as error:
                raise _loading_failed(checkpoint, error) from error
        result = super().train(*args, **kwargs)
        if self._stop_reason is not None:
            where = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            raise TrainingStopped(f"Training stopped: {self._stop_reason}. The checkpoint is {where}.")
        return result

    # ---- saving and resuming ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the model in Hugging Face format to `output_dir/hf`; every rank must call it."""
        folder = Path(output_dir or self.args.output_dir) / EXPORT_NAME
        export_model(
            self.accelerator.unwrap_model(self.model),
            folder,
            tokenizer=self.processing_class,
            model_card=render_model_card(self.model.config, self.state.log_history, self.args),
            max_shard_size=self.args.max_shard_size,
        )

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # A run that was set back comes here again: what is there stops being whole before it is written over.
            (checkpoint / TOPOLOGY_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        # Older checkpoints are rotated away only after this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except UserError:
            raise
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"Could not write {checkpoint}: {' '.join(str(error).split())}.") from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        error = None
        if self.args.should_save and not self.args.save_only_model:
            try:
                write_topology(checkpoint, self._topology, self.model.config)
            except OSError as cause:
                error = CheckpointError(f"Could not write {checkpoint}: {cause}.")
        raise_together(error)
        if self.args.should_save and limit:
            rotate_checkpoints(
                output_dir=str(checkpoint.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_rng_state(self, checkpoint) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:
            raise _loading_failed(checkpoint, error) from error

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        # Without DeepSpeed the weights to resume from are the checkpoint's export.
        try:
            super()._load_from_checkpoint(os.path.join(resume_from_checkpoint, EXPORT_NAME), model)
        except Exception as error:
            raise _loading_failed(resume_from_checkpoint, error) from error


def _loading_failed(checkpoint: str, error: Exception) -> CheckpointError:
    what = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{checkpoint} cannot be loaded ({type(error).__name__}: {what}); resume from another checkpoint."
    )
