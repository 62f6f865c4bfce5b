"""The Trainer over a pipeline: one `train_batch` of DeepSpeed's engine for each optimizer step."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from transformers.trainer import SCHEDULER_NAME

from ..parallel.processes import rank
from ..routing import MoERouter
from .evaluation import sample_statistics
from .measuring import num_unmasked
from .pipeline_outputs import WholeModelOutputs
from .resharding import continue_schedule
from .trainer import MoETrainer


class PipelineTrainer(MoETrainer):
    """`MoETrainer` whose model is one stage of a pipeline.

    All stages of a pipeline read the same rows, and each does its part of all micro-batches of a step at once, when
    Trainer comes to the last of them. The attention on first tokens is not measured.

    Args:
        **kwargs: of `MoETrainer`; the model is a `PipelinedCausalLM`.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._layout, stage = self.model.layout, self.model.stage
        # Columns of the data that Trainer would look for in the signature of a stage.
        self._signature_columns = ["input_ids", "attention_mask", "position_ids", "labels"]
        self._whole = WholeModelOutputs(self.model.config, stage.layers_here)
        self._pipe_group = self.model.mpu().get_pipe_parallel_group()
        self._batches: list[dict] = []
        accelerator = self.accelerator
        accelerator.prepare_data_loader = partial(_prepare_for_pipeline, accelerator, self._layout.data_parallel_size)

    # ---- data: the same rows for all stages of a pipeline ----

    def get_total_train_batch_size(self, args) -> int:
        """As in `Trainer`, over pipelines instead of ranks."""
        return super().get_total_train_batch_size(args) // self._layout.num_stages

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `MoETrainer`, with the micro-batches kept, and what every stage has counted taken once."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_tokens_in_batch = self._num_tokens_in_batch // self._layout.num_stages
        self._batches = batches
        return batches, num_items if num_items is None else num_items // self._layout.num_stages

    # ---- resuming ----

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """As in `Trainer`; rank 0 has saved its schedule, whose stage may have other optimizer groups than this one."""
        if checkpoint is not None:
            saved = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            continue_schedule(self.lr_scheduler, self.optimizer, saved)

    # ---- training ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Make the whole step when its last micro-batch is due; return its loss over all ranks, 0 before."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._batches = [self._prepare_inputs(batch) for batch in self._batches], []
        self.model.train_batch(
            model,
            batches,
            num_items_in_batch=num_items_in_batch,
            num_tokens_in_batch=self._num_tokens_in_batch,
            label_smoothing=self.args.label_smoothing_factor,
            output_router_statistics=self._is_logged,
        )
        for batch, outputs in zip(batches, self.model.outputs, strict=True):
            whole = self._whole.of(outputs, len(batch["input_ids"]), statistics=self._is_logged, training=True)
            num_tokens = num_unmasked(batch)
            self._statistics.add_micro_batch(whole, num_tokens if self.model.stage.is_first else 0 * num_tokens)
        # Each stage has the losses of its own layers.
        loss = torch.stack([outputs.loss.float() for outputs in self.model.outputs]).sum()
        dist.all_reduce(loss)
        return loss

    def floating_point_ops(self, inputs) -> float:
        """As in `MeasuringTrainer`: this rank's share, because Trainer adds up what all ranks tell."""
        return super().floating_point_ops(inputs) / self._layout.num_stages

    # ---- evaluating ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `MoETrainer`; the first stage returns the statistics, the others zeros, which add nothing to them."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad():
            self.model.eval_batch(self.deepspeed, batch, output_router_statistics=True)
            outputs = self._whole.of(self.model.outputs[0], len(batch["input_ids"]), statistics=True, training=False)
            statistics = sample_statistics(outputs, batch["labels"], batch.get("attention_mask"))
            if not self.model.stage.is_first:
                # Numbers of tokens, which every stage has counted.
                statistics[:, 1] = 0.0
                if outputs.tokens_per_expert is not None:
                    statistics[:, 4] = 0.0
            dist.all_reduce(statistics, group=self._pipe_group)
        if not self.model.stage.is_first:
            statistics = torch.zeros_like(statistics)
        return None, statistics, torch.zeros_like(statistics[:, 0])

    # ---- reporting ----

    def log(self, logs, start_time=None) -> None:
        """As in `MoETrainer`, without the steps of an evaluation, which Trainer counts by the number of ranks."""
        logs.pop("eval_steps_per_second", None)
        super().log(logs, start_time)

    def _router_biases(self) -> dict[str, float]:
        config = self.model.config
        if config.router_balancing != "loss_free" or not config.num_sparse_layers:
            return {}
        routers = [module for module in self.model.modules() if isinstance(module, MoERouter)]
        own = [torch.stack(torch.aminmax(router.e_score_correction_bias)) for router in routers]
        ranges = self._whole.by_layer(torch.stack(own) if own else torch.zeros(0, 2, device=self.args.device))
        dist.all_reduce(ranges, group=self._pipe_group)
        sparse = [index for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        return {
            f"router_bias_{name}/layer_{layer}": value
            for layer, values in zip(sparse, ranges.tolist(), strict=True)
            for name, value in zip(("min", "max"), values, strict=True)
        }


def _prepare_for_pipeline(accelerator, num_pipelines: int, loader, device_placement=None, slice_fn_for_dispatch=None):
    """As `Accelerator.prepare_data_loader`, but rows are dealt out to pipelines, not to ranks."""
    if loader in accelerator._dataloaders:
        return loader
    prepared = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=num_pipelines,
        process_index=rank() % num_pipelines,
        split_batches=accelerator.split_batches,
        put_on_device=accelerator.device_placement if device_placement is None else device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=accelerator.dispatch_batches,
        even_batches=accelerator.even_batches,
        slice_fn_for_dispatch=slice_fn_for_dispatch,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    accelerator._dataloaders.append(prepared)
    return prepared
