"""The Trainer: token-exact losses, no silent NaN, an end that leaves a checkpoint."""

import signal

import torch
from accelerate.utils import TorchDynamoPlugin
from transformers import Trainer

from ..errors import ConfigError, UserError
from ..parallel.deepspeed_config import autoep_enabled, expert_parallel_size, zero_stage
from ..parallel.engine import prepare_for_training, report_clipped_norm
from ..parallel.float8 import convert_to_float8
from ..parallel.processes import rank
from ..parallel.tensor_parallel import clip_by_all_experts
from .bias_update import RouterBiasUpdater
from .compiling import FETCHED_WHOLE, compile_dense_parts
from .liger import LigerKernels, use_liger_kernels
from .measuring import MeasuringTrainer, num_unmasked
from .nonfinite import NonFiniteGuard
from .preemption import Preempted, SignalWatch, spare_workers
from .router_optimizer import freeze_routers, split_router_group

# Trainer multiplies the loss by the ranks that read rows of their own; older ones take all ranks for such.
_KNOWS_AUTOTP = "get_tp_size" in Trainer.compute_loss.__code__.co_names


class TrainingStopped(UserError):
    """Training ended early on purpose; the message says why and where the last checkpoint is."""


class MoETrainer(MeasuringTrainer):
    """`Trainer` for `MoEForCausalLM` under DeepSpeed, DDP or in one process.

    Args:
        **kwargs: of `MeasuringTrainer`.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        # The model smooths labels itself, without having all logits at once.
        self.label_smoother = None
        if self.args.use_liger_kernel:
            # Trainer's own patches, which come later, know nothing of these layers.
            use_liger_kernels(self.model, LigerKernels(**self.args.liger_kernel_config or {}))
        if self.args.fp8:
            convert_to_float8(self.model, checkpointed=self.args.gradient_checkpointing)
        fetched_whole = FETCHED_WHOLE if self.args.torch_compile else ()
        prepare_for_training(self.model, self._deepspeed_json, fetched_whole)
        if self.args.torch_compile:
            compile_dense_parts(self.model, self.args.torch_compile_backend, self.args.torch_compile_mode)
        self._guard = NonFiniteGuard()
        self._signals = SignalWatch()
        self._stop_reason: str | None = None
        self._preempted_by: signal.Signals | None = None
        self._num_tokens_in_batch: torch.Tensor | int = 0
        self._last_counted_step = -1

    def _build_accelerator_args(self, **kwargs) -> dict:
        # Accelerate would compile whole layers, experts included.
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # ---- losses ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, and count the unmasked tokens of the whole batch, which the router losses are means over."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_tokens = self._in_whole_batch(sum(num_unmasked(batch) for batch in batches), device)
        if batches and self._topology.tensor_parallel_size > 1:
            # Trainer does not count the labels of ranks that read the same rows once in all versions and settings.
            num_labels = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batches)
            num_items_in_batch = self._in_whole_batch(num_labels, device)
        self._num_tokens_in_batch = num_tokens
        self._position.read(batches)
        if batches:
            shared = batches[0].get("shared_sequence")
            self._begin_step((batches[0]["input_ids"] if shared is None else shared.position_ids).shape[1])
        return batches, num_items_in_batch

    def _in_whole_batch(self, count: torch.Tensor | int, device: torch.device) -> torch.Tensor | int:
        """Add up a count over the ranks, where they count together; those that share matrices have counted the same."""
        if not (torch.is_tensor(count) and self.args.average_tokens_across_devices and self.args.world_size > 1):
            return count
        return self.accelerator.gather(count.to(device)).sum() // self._topology.tensor_parallel_size

    def _track_num_input_tokens(self, inputs) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self._topology.tensor_parallel_size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`, with the count of tokens and the smoothing of labels handed to the model.

        Training only: evaluation tells the cross-entropy of the labels, whose exponential is the perplexity.
        """
        smoothing = self.args.label_smoothing_factor
        inputs = {**inputs, "num_tokens_in_batch": self._num_tokens_in_batch, "label_smoothing": smoothing}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        is_scaled = self.args.average_tokens_across_devices and num_items_in_batch is not None
        if is_scaled and not _KNOWS_AUTOTP:
            loss = loss / self._topology.tensor_parallel_size
        return (loss, outputs) if return_outputs else loss

    # ---- steps ----

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._deepspeed_json is not None and not self._engine_checks_gradients():
            report_clipped_norm(self.model_wrapped)
        if self._deepspeed_json is not None:
            clip_by_all_experts(self.model_wrapped, self._deepspeed_json)
        self._bias_updater = RouterBiasUpdater(self.accelerator.unwrap_model(self.model))
        return prepared

    def create_optimizer(self, model=None):
        """As in `Trainer`; routers and AutoEP's experts get own groups, and a guard looks for NaN where nobody does.

        Routers that `--freeze_router` freezes are taken out of training here, before there is an engine.
        """
        if self.optimizer is not None:
            return self.optimizer
        if self._topology.routers == "frozen":
            freeze_routers(self.model)
        try:
            optimizer = super().create_optimizer(model)
        except ImportError as error:
            raise ConfigError(f"--optim {self.args.optim.value} needs a package: {error}") from error
        if self._topology.routers == "own":
            split_router_group(optimizer, self.model, self.args)
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
        self._end_step(self._num_tokens_in_batch)
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
        if self._preempted_by is not None and self._stop_reason is None:
            raise Preempted(
                f"Stopped by {self._preempted_by.name} after step {self.state.global_step}; the checkpoint is "
                f"{self._checkpoint_folder()}. Go on with --resume_from_checkpoint auto."
            )

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        # With --save_strategy best this decides what is saved, and a run that ends leaves a checkpoint.
        return is_best or self._stop_reason is not None or self._watchdog.collapsed is not None

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            TrainingStopped: too many steps in a row were not finite, or a router has collapsed and that was to end the
                run; a checkpoint was saved.
            Preempted: a signal has asked for the machine; a checkpoint was saved.
        """
        self._signals.start()
        result = super().train(*args, **kwargs)
        self._signals.stop()
        if (reason := self._stop_reason or self._watchdog.collapsed) is not None:
            raise TrainingStopped(f"Training stopped: {reason}. The checkpoint is {self._checkpoint_folder()}.")
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
