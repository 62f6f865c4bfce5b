"""A stage as DeepSpeed's `PipelineModule`, whose engine moves micro-batches through all of them.

What travels between stages is the hidden states alone. Masks, positions and labels are read by every stage itself,
because the ranks of one pipeline read the same rows. Router losses do not travel either: each stage adds the gradient
of its own to that of the hidden states it hands on, as Megatron-LM's `MoEAuxLossAutoScaler` does.
Sent along as a second tensor they would make DeepSpeed go backward through every stage twice (runtime/pipe/engine.py,
`_exec_backward_pass`: one backward pass for each tensor).
"""

import contextlib
import io
from collections.abc import Iterator

import torch
from torch import nn

from ..modeling_outputs import MoECausalLMOutput
from .pipeline_layout import PipelineLayout
from .pipeline_stage import PipelineStage
from .versions import require_supported

require_supported("deepspeed")

from deepspeed.runtime.pipe.engine import PipelineEngine  # noqa: E402
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec  # noqa: E402

Batch = dict[str, torch.Tensor]


class PipelinedCausalLM(PipelineModule):
    """The layers of this rank's stage under the names that they have in an `MoEForCausalLM`.

    DeepSpeed names the modules of a pipeline by their number; here they keep those of the model, so that AutoEP, the
    optimizer's groups, the gradient's families and the export find what they look for.

    Args:
        stage: of this rank, with weights.
        layout: of the pipeline.

    Attributes:
        stage: the same.
        layout: the same.
        outputs: of the last batch, one for every micro-batch, without graph and logits.
    """

    accepts_loss_kwargs = True
    main_input_name = "input_ids"
    loss_type = "ForCausalLM"

    def __init__(self, stage: PipelineStage, layout: PipelineLayout) -> None:
        # Not registered: its children are, under the names that they have there.
        self.__dict__["stage"] = stage
        self.layout = layout
        embeddings, head = _specs_of_ends(stage.whole_config.tie_word_embeddings)
        layers = [LayerSpec(nn.Module) for _ in range(stage.whole_config.num_hidden_layers)]
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's own table of layers
            super().__init__(
                [embeddings, *layers, LayerSpec(nn.Module), head], num_stages=layout.num_stages, dynamic_shape=True
            )
        self.config = stage.whole_config
        self.outputs: list[MoECausalLMOutput] = []
        self._batches: Iterator[Batch] = iter(())
        self._options: dict = {}
        self._num_accumulated = 1

    # ---- what DeepSpeed asks of a module ----

    def _partition_layers(self, method: str = "uniform") -> None:
        last = self.layout.num_stages
        # The embeddings come before the first layer, the final norm and the head after the last.
        self.parts = [bound + (stage > 0) + 2 * (stage == last) for stage, bound in enumerate(self.layout.bounds)]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        stage = self.stage
        # A plain dict, or tied weights would have a second name.
        del self.tied_modules
        self.tied_modules = {}
        self.model = stage.model
        parts = [*stage.model.layers]
        if stage.is_first:
            parts = [stage.model.embed_tokens, *parts]
        if stage.is_last:
            self.lm_head = stage.lm_head
            parts += [stage.model.norm, stage.lm_head]
        # What DeepSpeed saves and loads, one file each; the forward pass is the stage's own.
        self.forward_funcs = parts
        if stage.whole_config.tie_word_embeddings and (stage.is_first or stage.is_last):
            self.tied_modules[_TIED] = stage.model.embed_tokens if stage.is_first else stage.lm_head
            self.tied_weight_attrs[_TIED] = ["weight"]
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """Return the hidden states for the next stage, or on the last one the loss as the engine wants it."""
        result = self.stage.run(next(self._batches), received, **self._options)
        self.outputs.append(_without_graph(result))
        # The engine takes the mean over data-parallel ranks and micro-batches of what are shares of one sum.
        loss = result.loss * self.layout.data_parallel_size
        if self.stage.is_last:
            return loss * self._num_accumulated
        return _AddLoss.apply(result.logits, loss) if torch.is_grad_enabled() else result.logits

    # ---- batches ----

    def train_batch(self, engine: PipelineEngine, batches: list[Batch], **options) -> None:
        """Send the micro-batches of one optimizer step through all stages, forward and backward, and make the step.

        Args:
            engine: of this module.
            batches: on this rank's device, as many on every rank.
            **options: of `MoEForCausalLM.forward`, for all micro-batches.
        """
        self._feed(engine, batches, options)
        # The last step of an epoch may have fewer than the others.
        engine.micro_batches = len(batches)
        engine.train_batch(_first_inputs_and_labels(batches))

    def eval_batch(self, engine: PipelineEngine, batch: Batch, **options) -> None:
        """Send one micro-batch through all stages without gradients."""
        self._feed(engine, [batch], options)
        engine.eval_batch(
            _first_inputs_and_labels([batch]),
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )

    def _feed(self, engine: PipelineEngine, batches: list[Batch], options: dict) -> None:
        self.outputs = []
        self._batches, self._options = iter(batches), options
        self._num_accumulated = engine.gradient_accumulation_steps()

    # ---- what a model is asked for ----

    def train(self, mode: bool = True) -> "PipelinedCausalLM":
        """As in `nn.Module`, for the stage too."""
        self.stage.training = mode
        return super().train(mode)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.stage.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.stage.device

    @property
    def generation_config(self):
        """Of the whole model."""
        return self.stage.generation_config

    @property
    def reduce_router_statistics(self):
        """As in `MoEForCausalLM`: over the ranks that hold this stage."""
        return self.stage.reduce_router_statistics

    @reduce_router_statistics.setter
    def reduce_router_statistics(self, reduce) -> None:
        self.stage.reduce_router_statistics = reduce

    @property
    def assignment_counts(self) -> torch.Tensor | None:
        """As in `MoEForCausalLM`: of this stage's sparse layers."""
        return self.stage.assignment_counts

    @assignment_counts.setter
    def assignment_counts(self, counts: torch.Tensor | None) -> None:
        self.stage.assignment_counts = counts

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As in `PreTrainedModel`."""
        self.stage.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """As in `PreTrainedModel`, where newer versions of Transformers have it."""
        self.stage.activation_checkpointing_enable(*args, **kwargs)


# Name of the group of tied weights; DeepSpeed keeps it to itself.
_TIED = "embeddings"


def _specs_of_ends(tied: bool) -> tuple[LayerSpec, LayerSpec]:
    if not tied:
        return LayerSpec(nn.Embedding), LayerSpec(nn.Linear)
    return TiedLayerSpec(_TIED, nn.Embedding), TiedLayerSpec(_TIED, nn.Linear)


def _first_inputs_and_labels(batches: list[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((batch["input_ids"], batch["labels"]) for batch in batches)


def _without_graph(result: MoECausalLMOutput) -> MoECausalLMOutput:
    kept = {name: value.detach() for name, value in result.items() if isinstance(value, torch.Tensor)}
    kept.pop("logits", None)
    return type(result)(**kept)


class _AddLoss(torch.autograd.Function):
    """Identity on the hidden states that gives the gradient 1 to a loss beside them."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.dtype = loss.dtype
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device)
