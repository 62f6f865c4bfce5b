"""The part of the Trainer that measures: what is added up in each step, what log entries and evaluations tell."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import IntervalStrategy

from ..parallel.gradient_norms import GradientNorms
from ..parallel.processes import rank
from .checkpointing import CheckpointingTrainer
from .evaluation import EvaluationMetrics, gather_once, join_pieces, sample_statistics
from .flash_attention import document_bounds
from .telemetry.attention_sink import AttentionSink
from .telemetry.console import ConsoleCallback, PlainConsoleCallback
from .telemetry.images import RouterImages
from .telemetry.jsonlines import JsonLinesCallback
from .telemetry.loads import LatestLoads
from .telemetry.profiler import StepProfiler, parse_steps
from .telemetry.statistics import TrainingStatistics, router_bias_ranges
from .telemetry.throughput import Throughput, peak_memory_gib
from .telemetry.watchdog import RouterWatchdog

# Where the state of the statistics stands in the `trainer_state.json` of a checkpoint.
_STATISTICS = "TrainingStatistics"


class MeasuringTrainer(CheckpointingTrainer):
    """`Trainer` whose log entries tell of the routers, the gradient and the speed, exactly over ranks.

    A log entry costs one collective call besides the loss's own, and the steps in between none. Whoever makes the steps
    calls `_begin_step` and `_end_step`.

    Args:
        **kwargs: of `CheckpointingTrainer`.
    """

    def __init__(self, **kwargs) -> None:
        config, args = kwargs["model"].config, kwargs["args"]
        self._loads = LatestLoads()
        self._evaluation = EvaluationMetrics(config, self._loads)
        # So that the memory of an evaluation does not grow with its samples.
        args.batch_eval_metrics = True
        super().__init__(compute_metrics=self._evaluation, **kwargs)
        self._statistics = TrainingStatistics(
            config,
            self._loads,
            shares_are_sums=args.average_tokens_across_devices,
            dead_expert_steps=args.dead_expert_steps,
            num_copies=self._topology.tensor_parallel_size,
        )
        self._throughput = Throughput(config, args.peak_tflops)
        self._watchdog = RouterWatchdog(config, args)
        self._is_logged = self._measures_attention = False
        self._sequence_length = 0
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
                self.remove_callback(callback)
        self.add_callback((PlainConsoleCallback if args.disable_tqdm else ConsoleCallback)(self._loads))
        self.add_callback(JsonLinesCallback(self._loads))
        self.add_callback(RouterImages(self._loads, self.callback_handler.callbacks))
        self.add_callback(self._watchdog)
        self._profiler = StepProfiler(parse_steps(args.profile_steps), args.output_dir) if args.profile_steps else None
        if self._profiler is not None:
            self.add_callback(self._profiler)

    # ---- training ----

    def train(self, *args, **kwargs):
        """As in `Trainer`; steps that are traced are written even when the run ends among them."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._profiler is not None:
                self._profiler.finish()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._gradient_norms = GradientNorms(self.model_wrapped)
        self._attention_sink = AttentionSink(self.accelerator.unwrap_model(self.model))
        if (statistics := self.state.stateful_callbacks.get(_STATISTICS)) is not None:
            self._statistics.load_state_dict(statistics)
        self._throughput.restart_clock()
        return prepared

    def _begin_step(self, sequence_length: int) -> None:
        """Note the length of the rows, and have measured what only log entries tell of, if this step has one."""
        if self._sequence_length == 0 and rank() == 0:
            tqdm.write(self._throughput.describe(sequence_length))
        self._sequence_length = sequence_length
        self._is_logged = self._measures_attention = self._next_step_is_logged()
        if self._is_logged:
            self._gradient_norms.measure_next_step()

    def _next_step_is_logged(self) -> bool:
        """Tell before a step what `Trainer` decides after it; the data of the step have been read."""
        args, step = self.args, self.state.global_step + 1
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == IntervalStrategy.STEPS:
            return step % self.state.logging_steps == 0
        ends_epoch = self.accelerator.gradient_state.end_of_dataloader or step == self.state.max_steps
        return args.logging_strategy == IntervalStrategy.EPOCH and ends_epoch

    def _prepare_inputs(self, inputs):
        """As in `Trainer`; flash attention is told where the documents of packed rows begin."""
        inputs = super()._prepare_inputs(inputs)
        is_flash = "flash" in self.accelerator.unwrap_model(self.model).config._attn_implementation
        # Pieces of rows were told when the rows were cut.
        return {**inputs, **document_bounds(inputs)} if is_flash and "shared_sequence" not in inputs else inputs

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`; after the last micro-batch of a step that is logged the gradient is measured."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._is_logged and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self._gradient_norms.measure(scaler.get_scale() if scaler is not None else 1.0)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`, with the loss's parts and the routers' statistics kept for the log."""
        inputs = {**inputs, "skip_logits": True, "output_router_statistics": self._is_logged}
        with self._measured_attention(inputs):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        self._statistics.add_micro_batch(outputs, num_unmasked(inputs))
        return (loss, outputs) if return_outputs else loss

    def _measured_attention(self, inputs: dict) -> AbstractContextManager:
        if not self._measures_attention:
            return nullcontext()
        self._measures_attention = False
        if (shared := inputs.get("shared_sequence")) is not None:
            places = shared.position_ids
            return self._attention_sink.measure(places, shared.attention_mask, places, shared.whole)
        return self._attention_sink.measure(
            inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        )

    def _end_step(self, num_tokens: torch.Tensor | int) -> None:
        """Count an optimizer step over so many unmasked tokens, as many as the losses are means over."""
        self._statistics.add_step(num_tokens)
        # Where ranks do not count together, the others are taken to have as many.
        num_counts = 1 if self.args.average_tokens_across_devices else self._topology.num_data_ranks
        self._throughput.add_step(num_counts * num_tokens, self._sequence_length)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # The flags are lowered as soon as they have been followed.
        pauses = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if pauses:
            self._throughput.restart_clock()

    def floating_point_ops(self, inputs) -> int:
        """6 FLOPs for each *active* matrix parameter and token, forward and backward; attention is not counted."""
        # Trainer adds them up over ranks, of which those that share matrices have the same tokens.
        flops = 6 * self._active_parameters.in_matrices * inputs["input_ids"].numel()
        return flops // self._topology.tensor_parallel_size

    # ---- evaluating ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return statistics of every sample instead of logits; `EvaluationMetrics` adds them up."""
        with torch.no_grad(), self.compute_loss_context_manager():
            statistics = self._evaluate_together(self._prepare_inputs(inputs), partial(self._sample_statistics, model))
        # Trainer computes metrics only where there are labels; ours are already in the statistics.
        return None, statistics, torch.zeros_like(statistics[:, 0])

    def _sample_statistics(self, model, inputs: dict) -> torch.Tensor:
        shared = inputs.get("shared_sequence")
        # Of pieces, each loss is then a share of the sequences'.
        num_tokens = None if shared is None else shared.sum(num_unmasked(inputs))
        outputs = model(**inputs, num_tokens_in_batch=num_tokens, skip_logits=True, output_router_statistics=True)
        columns = (inputs.get(name) for name in ("attention_mask", "shift_labels"))
        statistics = sample_statistics(outputs, inputs["labels"], *columns)
        return statistics if shared is None else join_pieces(statistics, shared, self.model.config.num_sparse_layers)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`, but training goes on with the random numbers that it would have had without."""
        self._evaluation.reset()
        with torch.random.fork_rng(devices=[]), gather_once(self.accelerator, self._topology.tensor_parallel_size):
            return super().evaluate(*args, **kwargs)

    # ---- reporting ----

    def log(self, logs, start_time=None) -> None:
        """As in `Trainer`, with the statistics, throughput and skipped steps in every training entry."""
        if "loss" in logs:
            self._statistics.add_gradients(self._gradient_norms.squared_sums())
            self._statistics.add_attention_sink(self._attention_sink.pop())
            logs |= self._statistics.pop(peak_memory_gib())
            logs |= self._router_biases()
            logs |= self._throughput.pop() | {"skipped_steps": self._skips.total}
        elif "eval_loss" in logs:
            self._statistics.settle_tokens()
            if self._statistics.num_tokens:
                logs["num_tokens"] = self._statistics.num_tokens
        super().log(logs, start_time)
        # The state goes into every checkpoint: what is said of single layers is in metrics.jsonl.
        entry = self.state.log_history[-1]
        self.state.log_history[-1] = {name: value for name, value in entry.items() if "/layer_" not in name}

    def _router_biases(self) -> dict[str, float]:
        return router_bias_ranges(self.accelerator.unwrap_model(self.model))

    def _save_checkpoint(self, model, trial) -> None:
        self._statistics.settle_tokens()
        self.state.stateful_callbacks[_STATISTICS] = self._statistics.state_dict()
        super()._save_checkpoint(model, trial)


def num_unmasked(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return how many tokens of a batch are not padding, on its device."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.sum()
    return torch.full((), batch["input_ids"].numel(), dtype=torch.int64, device=batch["input_ids"].device)
