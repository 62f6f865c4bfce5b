"""Whole models that are trained: Transformers' own, with Liger's kernels or DeepSpeed's layer, and ours."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.training.arguments import MoETrainingArguments
from moe_hf.training.compiling import check_compilation

from ..cases import StepCase
from .autoep import why_no_autoep
from .base import needs_cuda_package, refusal
from .blocks import too_large_for_batched_mm, unregistered

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CLASSES = {"mixtral": MixtralForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM, "olmoe": OlmoeForCausalLM}
_QK_NORM = {"mixtral": None, "qwen3_moe": "head", "olmoe": "full"}


class ModelPeer(ABC):
    """One model and the optimizer that it is trained with.

    Args:
        name: in the table.
        optim: of `TrainingArguments`; its default when not given.
    """

    def __init__(self, name: str, optim: str | None = None) -> None:
        self.name, self.optim = name, optim

    @abstractmethod
    def unavailable(self, case: StepCase, device: str) -> str | None:
        """Return why this peer cannot train the case here, or `None`."""

    @abstractmethod
    def build(self, case: StepCase) -> nn.Module:
        """Return the model in float32 on the default device, with weights of any value."""

    def load(self, case: StepCase, weights: dict[str, torch.Tensor], device: torch.device) -> nn.Module:
        """Build the model on a device with the given weights, in float32."""
        with torch.device(device):
            model = self.build(case)
        model.load_state_dict(weights)
        return model

    @abstractmethod
    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Return what is trained on `(B, S)` tokens."""

    def cross_entropy(self, model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, and the cross-entropy in it."""
        loss = self.loss(model, tokens)
        return loss, loss

    def cross_entropy_alone(self, model: nn.Module) -> AbstractContextManager:
        """Let the loss be the cross-entropy, which all models have in common, as long as the context lasts."""
        return nullcontext()

    def deepspeed_section(self) -> dict[str, Any]:
        """Return what the DeepSpeed JSON has beside what all have."""
        return {}

    def prepare(self, engine: Any) -> Any:
        """Return the engine that holds the model, with what is left to be done to it."""
        return engine

    def optimizer(self, model: nn.Module, **values) -> torch.optim.Optimizer:
        """Return a fresh optimizer, as `Trainer` makes it.

        Args:
            model: with the parameters.
            **values: of `TrainingArguments`: the learning rate and so on.
        """
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.arguments(**values))
        return kind(model.parameters(), **settings)

    def arguments(self, **values) -> TrainingArguments:
        """Return the arguments that choose the optimizer."""
        chosen = {} if self.optim is None else {"optim": self.optim}
        return TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **chosen, **values)


class TransformersModel(ModelPeer):
    """A model of Transformers.

    Args:
        implementation: of the experts.
    """

    def __init__(self, name: str, implementation: str, optim: str | None = None) -> None:
        super().__init__(name, optim)
        self.implementation = implementation

    def unavailable(self, case: StepCase, device: str) -> str | None:
        if (reason := unregistered(self.implementation)) is not None:
            return reason
        if self.implementation == "batched_mm":
            return too_large_for_batched_mm(case, case.micro_tokens, device, case.layers)
        return None

    def build(self, case: StepCase) -> PreTrainedModel:
        model_class = _CLASSES[case.family]
        return model_class._from_config(
            transformers_config(case), dtype=torch.float32, experts_implementation=self.implementation
        )

    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


class OurOptimizer(TransformersModel):
    """A model of Transformers with the optimizer of run_clm_moe.py: what is gained by the optimizer is told apart."""

    def unavailable(self, case: StepCase, device: str) -> str | None:
        own, theirs = (
            kind(output_dir="unused", use_cpu=True).optim for kind in (MoETrainingArguments, TrainingArguments)
        )
        if own == theirs:
            return f"it is the default of TrainingArguments too: {own.value}"
        return super().unavailable(case, device)

    def arguments(self, **values) -> TrainingArguments:
        return MoETrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **values)


class LigerModel(TransformersModel):
    """A model of Transformers with Liger's kernels, its loss included.

    Liger exchanges the rotary function of the whole family; here it is exchanged while this model runs forward.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "grouped_mm")
        self._rotate: Callable | None = None

    def unavailable(self, case: StepCase, device: str) -> str | None:
        if case.family == "olmoe":
            return "Liger does not know OLMoE"
        return needs_cuda_package("liger_kernel", device)

    def build(self, case: StepCase) -> PreTrainedModel:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        model = super().build(case)
        module = sys.modules[type(model).__module__]
        before = dict(vars(module))
        MODEL_TYPE_TO_APPLY_LIGER_FN[case.family](model=model)
        self._rotate = module.apply_rotary_pos_emb
        vars(module).update(before)
        return model

    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        module = sys.modules[type(getattr(model, "module", model)).__module__]
        with mock.patch.object(module, "apply_rotary_pos_emb", self._rotate):
            return super().loss(model, tokens)


class AutoEPModel(TransformersModel):
    """A model of Transformers whose blocks DeepSpeed replaces, all experts on one process.

    Args:
        compiles: whether all but experts and routers is compiled, layer by layer.
        options: of the section `expert_parallel`, beside the size.
    """

    def __init__(self, name: str, compiles: bool = False, **options) -> None:
        super().__init__(name, "grouped_mm")
        self.compiles, self.options = compiles, options

    def unavailable(self, case: StepCase, device: str) -> str | None:
        reason = why_no_autoep(device, self.options)
        if reason is None and self.compiles:
            reason = refusal(lambda: check_compilation(backend=None, mode=None))
        return reason

    def deepspeed_section(self) -> dict[str, Any]:
        compiled = {"compile": {"autoep_non_moe": True}} if self.compiles else {}
        return {"expert_parallel": {"enabled": True, "autoep_size": 1, **self.options}, **compiled}

    def prepare(self, engine: Any) -> Any:
        if self.compiles:
            engine.compile()
        return engine

    def optimizer(self, model: nn.Module, **values) -> torch.optim.Optimizer:
        from moe_hf.parallel.autoep import split_expert_groups

        optimizer = super().optimizer(model, **values)
        split_expert_groups(optimizer, model, 1)
        return optimizer


class OurModel(ModelPeer):
    """`MoEForCausalLM` as run_clm_moe.py trains it: its optimizer, its loss in chunks, its balancing losses."""

    def unavailable(self, case: StepCase, device: str) -> str | None:
        return None

    def build(self, case: StepCase) -> MoEForCausalLM:
        return MoEForCausalLM._from_config(our_config(case), dtype=torch.float32)

    def loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return self.cross_entropy(model, tokens)[0]

    def cross_entropy(self, model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False, skip_logits=True)
        return outputs.loss, outputs.ce_loss

    def cross_entropy_alone(self, model: nn.Module) -> AbstractContextManager:
        return mock.patch.multiple(model.config, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)

    def arguments(self, **values) -> TrainingArguments:
        return MoETrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **values)


def transformers_config(case: StepCase) -> PreTrainedConfig:
    """Return the family's own configuration; a chosen expert's weight is divided by the sum in all of them."""
    common = {
        "vocab_size": case.vocab_size,
        "hidden_size": case.hidden_size,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.key_heads,
        "num_experts_per_tok": case.top_k,
        "max_position_embeddings": case.sequence_length,
        "rope_parameters": ROPE,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        # OLMoE's embedding of padding does not learn; no token is padding here.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if case.family == "mixtral":
        return MixtralConfig(intermediate_size=case.width, num_local_experts=case.num_experts, **common)
    if case.family == "olmoe":
        return OlmoeConfig(intermediate_size=case.width, num_experts=case.num_experts, norm_topk_prob=True, **common)
    return Qwen3MoeConfig(
        intermediate_size=case.width,
        moe_intermediate_size=case.width,
        num_experts=case.num_experts,
        norm_topk_prob=True,
        head_dim=case.hidden_size // case.heads,
        **common,
    )


def our_config(case: StepCase) -> MoEConfig:
    """Return the configuration of the same model of ours."""
    scope = _QK_NORM[case.family]
    return MoEConfig(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        moe_intermediate_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
        max_position_embeddings=case.sequence_length,
        rope_parameters=ROPE,
        rms_norm_eps=1e-6,
        use_qk_norm=scope is not None,
        **({} if scope is None else {"qk_norm_scope": scope}),
    )
