"""One stage of a pipeline: the model's own classes with only some of the layers in them."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..configuration_moe import MoEConfig
from ..language_head import LanguageHead
from ..modeling_moe import MoEDecoderLayer, MoEForCausalLM, MoERMSNorm, MoERotaryEmbedding
from ..modeling_outputs import MoECausalLMOutput
from .pipeline_layout import PipelineLayout


class PipelineStage(MoEForCausalLM):
    """`MoEForCausalLM` with the layers of one stage, which keep their names in the whole model.

    The forward pass is the model's own, given labels on every stage: so each adds the router losses of its own layers,
    and what stages hand on is all that differs. Instead of logits, all but the last return the hidden states for the
    next one, and a cross-entropy of 0.

    Args:
        config: of the whole model.
        layout: of the pipeline.
        stage: which one.

    Attributes:
        whole_config: of the whole model; `config` counts the layers of this stage only.
    """

    def __init__(self, config: MoEConfig, layout: PipelineLayout, stage: int) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.whole_config = config
        self.layers_here = layout.layers(stage)
        self.is_first, self.is_last = stage == 0, stage == layout.num_stages - 1
        own = nn.ModuleList()
        for index in self.layers_here:
            # A list numbers its modules from 0; named one by one they keep their places in the whole model.
            own.add_module(str(index), self.model.layers[index])
        self.model.layers = own
        self.model.rotary_emb = MoERotaryEmbedding(config)
        if not self.is_first:
            self.model.embed_tokens = None
        if not self.is_last:
            self.model.norm, self.lm_head = nn.Identity(), nn.Identity()
            self.loss_function = _no_cross_entropy
        self.config = self.model.config = self._own_config()

    def _own_config(self) -> MoEConfig:
        config = copy.copy(self.whole_config)
        config.mlp_layer_types = [self.whole_config.mlp_layer_types[index] for index in self.layers_here]
        config.num_hidden_layers = len(self.layers_here)
        if not self.is_first:
            config.hidden_dropout = 0.0  # of the embeddings; layers have read it before
        if not self.is_last:
            config.output_z_loss_coef = 0.0
        return config

    def run(self, batch: dict[str, torch.Tensor], received: torch.Tensor, **options) -> MoECausalLMOutput:
        """Return the output of this stage for one micro-batch; its `logits` go to the next stage.

        Args:
            batch: `input_ids`, `labels` and, where there are any, `attention_mask` and `position_ids`, `(B, S)`.
            received: the hidden states `(B, S, H)` of the stage before, on the first stage token ids `(B, S)`.
            **options: of `MoEForCausalLM.forward`.
        """
        inputs = {name: value for name, value in batch.items() if name != "input_ids"}
        inputs["input_ids" if self.is_first else "inputs_embeds"] = received
        if not self.is_last:
            options.pop("label_smoothing", None)
        return self(**inputs, use_cache=False, skip_logits=self.is_last, **options)

    def part_filled_from(self, name: str) -> nn.Module | None:
        """Return the module of this stage that takes its weights from the part of a whole model with this name."""
        if name == "model.embed_tokens" and self.is_last and self.whole_config.tie_word_embeddings:
            return self.lm_head
        if name == "lm_head" and self.whole_config.tie_word_embeddings:
            return None
        part = dict(self.named_modules()).get(name)
        return None if isinstance(part, nn.Identity) else part

    @torch.no_grad()
    def load(self, read: Callable[[str], torch.Tensor]) -> None:
        """Take the weights of this stage, and no others, from a saved model.

        Args:
            read: returns a tensor of the whole model by its name.
        """
        tied = self.is_last and self.whole_config.tie_word_embeddings
        renamed = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        tensors = {name: read(renamed.get(name, name)).to(own.dtype) for name, own in self.state_dict().items()}
        self.load_state_dict(tensors, assign=True)


def _no_cross_entropy(logits: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return torch.zeros((), device=logits.device)


# ---- initial weights ----


@torch.no_grad()
def fill_randomly(stage: PipelineStage) -> None:
    """Give a stage the random weights that the whole model has in one process with the same state of the generator.

    Everything is drawn in the model's own order, one module at a time, and only what belongs to the stage is kept: the
    stage and one layer are all that is ever in memory.
    """
    config = stage.whole_config
    decoder = [("model.embed_tokens", nn.Embedding, (config.vocab_size, config.hidden_size))]
    decoder += [(f"model.layers.{i}", MoEDecoderLayer, (config, i)) for i in range(config.num_hidden_layers)]
    _draw_in_order(stage, decoder)
    _draw_in_order(stage, [("lm_head", LanguageHead, (config.hidden_size, config.vocab_size, False))])
    if stage.is_last:
        norm = MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        stage.model.norm.load_state_dict(norm.state_dict(), assign=True)


def _draw_in_order(stage: PipelineStage, parts: list[tuple]) -> None:
    """Draw what torch's constructors draw for all parts, and then what the model's initialisation does."""
    for _, kind, args in parts:
        kind(*args)
    for name, kind, args in parts:
        with torch.device("meta"):
            part = kind(*args)
        part.to_empty(device="cpu")
        for module in _children_first(part):
            stage._initialize_weights(module)
        if (own := stage.part_filled_from(name)) is not None:
            own.load_state_dict(part.state_dict(), assign=True)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module
