"""The half of the Trainer that saves and resumes: complete exports, whole checkpoints, any topology, the hub."""

import math
import os
from pathlib import Path

import torch
from transformers import TrainerState, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.export import export_model
from ..checkpoint.manifest import EXPORT_NAME, Manifest, Progress, read_manifest
from ..checkpoint.model_card import TrainingData, active_parameters, render_model_card
from ..checkpoint.topology import Topology, needs_conversion
from ..errors import CheckpointError, UserError
from ..parallel.deepspeed_config import autoep_enabled
from ..parallel.processes import raise_together, rank
from . import saving
from .hub_push import HubPusher
from .nonfinite import SkipCounter
from .position import DataPosition
from .resharding import continue_schedule, load_resharded
from .router_optimizer import keep_router_settings, load_regrouped
from .sequence_parallel import reader
from .stream_training import StreamingTrainer


class CheckpointingTrainer(StreamingTrainer):
    """`Trainer` whose checkpoints know their topology and their place in the data, and hold a complete export.

    Args:
        topology: layout of this run, recorded in every checkpoint.
        data: what it is trained on, for the model card.
        **kwargs: of `Trainer`; `processing_class` is exported beside the weights.
    """

    def __init__(self, *, topology: Topology, data: TrainingData | None = None, **kwargs) -> None:
        self._pusher: HubPusher | None = None
        super().__init__(**kwargs)
        self._topology = topology
        self._data = data
        self._deepspeed_json = self.args.deepspeed if self.is_deepspeed_enabled else None
        self._active_parameters = active_parameters(self.model.config)
        self._skips = SkipCounter(self.args.max_skipped_steps)
        self._position = DataPosition(self.train_dataset, self.args, reader(self.args)[1])
        self._resumed: Manifest | None = None
        self._staging: Path | None = None

    def train(self, *args, **kwargs):
        """As in `Trainer`."""
        if (checkpoint := self.args.resume_from_checkpoint) is not None:
            self._restore_progress(checkpoint)
        saving.check_shared(Path(self.args.output_dir))
        return super().train(*args, **kwargs)

    # ---- saving ----

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

    def _finalize_training(self, *args, **kwargs):
        # With a limit of 1 Trainer would now delete the newest checkpoint if it is not the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # ---- resuming ----

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        converts = resume_from_checkpoint is not None and needs_conversion(self._resumed.topology, self._topology)
        loaded_by_trainer = None if converts else resume_from_checkpoint
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, loaded_by_trainer)
            # Building an engine draws random numbers, more of them with expert parallelism than without.
            set_seed(self.args.seed)
            if converts:
                self._load_resharded(Path(resume_from_checkpoint))
        except UserError:
            raise
        except Exception as error:
            if resume_from_checkpoint is None or self.deepspeed is None:
                raise  # the engine is built first: without one it was not the checkpoint
            raise _loading_failed(resume_from_checkpoint, error) from error
        keep_router_settings(self.optimizer, self.lr_scheduler, self.args)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or self.deepspeed is not None or self._resumed.topology.routers == self._topology.routers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = Path(checkpoint)
        load_regrouped(self.optimizer, self.model, path / OPTIMIZER_NAME, self._resumed.topology.routers)
        continue_schedule(self.lr_scheduler, self.optimizer, torch.load(path / SCHEDULER_NAME, weights_only=True))

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
        if resume_from_checkpoint is None or self.args.ignore_data_skip or self._stream is not None:
            return place
        return self._position.place(self.args.gradient_accumulation_steps)

    def _restore_progress(self, checkpoint: str) -> None:
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        except Exception as error:
            raise _loading_failed(checkpoint, error) from error
        self._resumed = read_manifest(Path(checkpoint))
        progress = self._resumed.progress
        self._position.samples_seen = progress.samples_seen
        self._skips.total, self._skips.in_a_row = progress.skipped_steps, progress.skipped_in_a_row
        self._restore_stream(Path(checkpoint))

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


def _loading_failed(checkpoint: str, error: Exception) -> CheckpointError:
    what = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{checkpoint} cannot be loaded ({type(error).__name__}: {what}); resume from another checkpoint."
    )
