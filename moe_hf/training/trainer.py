"""The Trainer: token-exact losses, complete exports, checkpoints that know their topology, no silent NaN."""

import math
import os
import signal
from pathlib import Path

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.export import export_model
from ..checkpoint.manifest import EXPORT_NAME, Manifest, Progress, read_manifest
from ..checkpoint.model_card import TrainingData, active_parameters, render_model_card
from ..checkpoint.topology import Topology, needs_conversion
from ..errors import CheckpointError, ConfigError, UserError
from ..parallel.deepspeed_config import autoep_enabled, expert_parallel_size, zero_stage
from ..parallel.engine import prepare_for_training, report_clipped_norm
from ..parallel.processes import raise_together, rank
from . import saving
from .bias_update import RouterBiasUpdater
from .evaluation import compute_metrics, sample_statistics
from .hub_push import HubPusher
from .metrics import ConsoleCallback, JsonLinesCallback, PlainConsoleCallback, TrainingMetrics
from .nonfinite import NonFiniteGuard, SkipCounter
from .position import DataPosition
from .preemption import Preempted, SignalWatch, spare_workers
from .resharding import continue_schedule, load_resharded


class TrainingStopped(UserError):
    """Training ended early on purpose; the message says why and where the last checkpoint is."""


class MoETrainer(Trainer):
    """`Trainer` for `MoEForCausalLM` under DeepSpeed, DDP or in one process.

    Args:
        topology: layout of this run, recorded in every checkpoint.
        data: what it is trained on, for the model card.
        **kwargs: of `Trainer`; `processing_class` is exported beside the weights.
    """

    def __init__(self, *, topology: Topology, data: TrainingData | None = None, **kwargs) -> None:
        self._pusher: HubPusher | None = None
        super().__init__(compute_metrics=compute_metrics, **kwargs)
        self._topology = topology
        self._data = data
        self._deepspeed_json = self.args.deepspeed if self.is_deepspeed_enabled else None
        prepare_for_training(self.model, self._deepspeed_json)
        sparse = [i for i, kind in enumerate(self.model.config.mlp_layer_types) if kind == "sparse"]
        self._metrics = TrainingMetrics(sparse, shares_are_sums=self.args.average_tokens_across_devices)
        self._skips = SkipCounter(self.args.max_skipped_steps)
        self._guard = NonFiniteGuard()
        self._signals = SignalWatch()
        self._stop_reason: str | None = None
        self._preempted_by: signal.Signals | None = None
        self._staging: Path | None = None
        self._position = DataPosition(self.train_dataset, self.args)
        self._resumed: Manifest | None = None
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
        self._position.read(batches)
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

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`, but training goes on with the random numbers that it would have had without."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs) -> int:
        """6 FLOPs for each *active* matrix parameter and token, forward and backward; attention is not counted."""
        return 6 * self._active_parameters.in_matrices * inputs["input_ids"].numel()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        converts = resume_from_checkpoint is not None and needs_conversion(self._resumed.topology, self._topology)
        loaded_by_trainer = None if converts else resume_from_checkpoint
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, loaded_by_trainer)
            if converts:
                self._load_resharded(Path(resume_from_checkpoint))
        except UserError:
            raise
        except Exception as error:
            if resume_from_checkpoint is None or self.deepspeed is None:
                raise  # the engine is built first: without one it was not the checkpoint
            raise _loading_failed(resume_from_checkpoint, error) from error
        if self._deepspeed_json is not None and not self._engine_checks_gradients():
            report_clipped_norm(self.model_wrapped)
        self._bias_updater = RouterBiasUpdater(self.accelerator.unwrap_model(self.model))
        self._metrics.restart_clock()
        return prepared

    def _load_resharded(self, checkpoint: Path) -> None:
        load_resharded(self.deepspeed, checkpoint, expert_parallel=autoep_enabled(self._deepspeed_json))
        schedule = torch.load(checkpoint / SCHEDULER_NAME, weights_only=True)
        continue_schedule(self.lr_scheduler, self.optimizer, schedule)

    def set_initial_training_values(self, args, dataloader):
        """As in `Trainer`, where steps that a checkpoint has made with another batch size count by their rows."""
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self._resumed is not None and not args.ignore_data_skip:
            step = self._resumed.progress.step
            surplus = step - self._position.steps_of_this_size(steps_per_epoch, otherwise=step)
            if args.max_steps > 0:
                epochs = max(1, math.ceil((max_steps - surplus) / steps_per_epoch))
            else:
                max_steps += surplus
        return epochs, steps_per_epoch, *others, max_steps

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """As in `Trainer`, but the place in the data is told by the rows that were seen, not by steps of this size."""
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.args.ignore_data_skip:
            return place
        return self._position.place(self.args.gradient_accumulation_steps)

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
        self._position.step(ends_epoch=float(self.state.epoch).is_integer())
        skipped = self._guard.skipped or self.accelerator.optimizer_step_was_skipped
        # Here, because checkpoints of this step come after it.
        self._bias_updater.step(skipped)
        if self._skips.add(skipped):
            self._stop_reason = (
                f"{self._skips.in_a_row} steps in a row had a loss or gradients that were NaN or infinite and were "
                f"skipped (step {self.state.global_step}, max_skipped_steps={self.args.max_skipped_steps}); "
                "lower the learning rate or look at the data"
            )
            self.control.should_save = True
            self.control.should_training_stop = True
        self._preempted_by = self._signals.agreed(self.args.device)
        if self._preempted_by is not None:
            # There may be half a minute left: enough for a checkpoint to go on from, but not for an evaluation.
            self.control.should_save, self.control.should_evaluate = True, False
            self.args.save_only_model = False
            if rank() == 0:
                print(f"{self._preempted_by.name}: saving a checkpoint.", flush=True)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._count_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            # Trainer resets its sum by subtracting it from itself, which leaves a NaN in there for ever.
            self._tr_loss.zero_()
        if self.control.should_evaluate or self.control.should_save:
            self._metrics.restart_clock()
        if self._preempted_by is not None and self._stop_reason is None:
            raise Preempted(
                f"Stopped by {self._preempted_by.name} after step {self.state.global_step}; the checkpoint is "
                f"{self._checkpoint_folder()}. Go on with --resume_from_checkpoint auto."
            )

    def log(self, logs, start_time=None) -> None:
        """As in `Trainer`, with the loss's parts, throughput and skipped steps in every training entry."""
        if "loss" in logs:
            logs |= self._metrics.pop() | {"skipped_steps": self._skips.total}
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            TrainingStopped: too many steps in a row were not finite; a checkpoint was saved.
            Preempted: a signal has asked for the machine; a checkpoint was saved.
        """
        if (checkpoint := self.args.resume_from_checkpoint) is not None:
            self._restore_progress(checkpoint)
        saving.check_shared(Path(self.args.output_dir))
        self._signals.start()
        result = super().train(*args, **kwargs)
        self._signals.stop()
        if self._stop_reason is not None:
            raise TrainingStopped(
                f"Training stopped: {self._stop_reason}. The checkpoint is {self._checkpoint_folder()}."
            )
        return result

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Trainer would make a step more than asked for when the run it goes on from was at its end.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        spare_workers(loader)
        return loader

    def _finalize_training(self, *args, **kwargs):
        # With a limit of 1 Trainer would now delete the newest checkpoint if it is not the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # ---- saving and resuming ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the model in Hugging Face format to `output_dir/hf`; every rank must call it."""
        folder = Path(output_dir or self.args.output_dir) / EXPORT_NAME
        export_model(
            self.accelerator.unwrap_model(self.model),
            folder,
            tokenizer=self.processing_class,
            model_card=render_model_card(
                self.model.config,
                self.state.log_history,
                self.args,
                data=self._data,
                topology=self._topology,
                num_tokens=round(self.state.total_flos / (6 * self._active_parameters.in_matrices)),
            ),
            max_shard_size=self.args.max_shard_size,
        )

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is being saved, Trainer writes to a folder beside its place.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = self._checkpoint_folder()
        self._staging = saving.begin(checkpoint)
        try:
            self._write_checkpoint(model, trial, checkpoint)
            saving.finish(
                checkpoint,
                self._topology,
                self.model.config,
                self._progress(),
                weights_only=self.args.save_only_model,
            )
        except Exception:
            saving.discard(checkpoint)
            raise
        finally:
            self._staging = None
        if rank() == 0:
            if self._pusher is not None:
                self._pusher.push_checkpoint(checkpoint / EXPORT_NAME, self.state.global_step)
            saving.rotate(checkpoint.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, model, trial, checkpoint: Path) -> None:
        try:
            super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(checkpoint)
        except (UserError, OSError, RuntimeError) as error:
            raise saving.could_not_write(checkpoint, error) from error
        self.accelerator.wait_for_everyone()
        saving.write_latest(self._staging / checkpoint.name)

    # ---- the hub: what is pushed is the export, which Trainer would not find ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, on rank 0; every rank must call it."""
        error = None
        if rank() == 0:
            self._pusher = HubPusher(self.args)
            try:
                self._pusher.open()
            except UserError as met:
                error = met
        raise_together(error)

    def push_to_hub(self, *args, **kwargs) -> None:
        """Push the export in `output_dir`, from rank 0; other ranks do not wait for it."""
        if self._pusher is not None:
            self._pusher.push(Path(self.args.output_dir) / EXPORT_NAME)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Come back later: the checkpoint is not in its place yet (see `_save_checkpoint`)."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.deepspeed is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        # DeepSpeed's rank 0 would write `latest` while other ranks are still writing what it points to.
        with saving.without_latest(self.deepspeed):
            super()._save_optimizer_and_scheduler(output_dir)

    def _name_best_checkpoint(self, checkpoint: Path) -> None:
        """Let the saved state name the best checkpoint by where it will be, not by where it is being written."""
        best = checkpoint.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == checkpoint or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            if rank() == 0:
                self.state.save_to_json(str(self._staging / checkpoint.name / TRAINER_STATE_NAME))

    def _progress(self) -> Progress:
        return Progress(
            step=self.state.global_step,
            samples_seen=self._position.samples_seen,
            global_batch_size=self._position.global_batch_size,
            skipped_steps=self._skips.total,
            skipped_in_a_row=self._skips.in_a_row,
        )

    def _restore_progress(self, checkpoint: str) -> None:
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        except Exception as error:
            raise _loading_failed(checkpoint, error) from error
        self._resumed = read_manifest(Path(checkpoint))
        progress = self._resumed.progress
        self._position.samples_seen = progress.samples_seen
        self._skips.total, self._skips.in_a_row = progress.skipped_steps, progress.skipped_in_a_row

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
