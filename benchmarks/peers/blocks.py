"""Sparse blocks of Transformers, with each of its implementations of experts, and ours."""

import psutil
import torch
from torch import nn
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sonicmoe import is_sonicmoe_loadable
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe_hf import MoEConfig
from moe_hf.modeling_moe import MoESparseBlock

from ..cases import DTYPES, LayerCase, StepCase
from .base import Layer, LayerPeer, copy_into

OUR_KERNEL = "moe_hf"
"""Name of our kernel in Transformers' registry of experts."""

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "sonicmoe")
"""Transformers' own."""

# `batched_mm` copies the weights of its experts for every token; with their gradients, sorted and summed, this often.
_COPIES = 6
_USABLE = 0.8


def _mixtral(case: LayerCase) -> nn.Module:
    config = MixtralConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.width,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    return MixtralSparseMoeBlock(config)


def _qwen3_moe(case: LayerCase) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=case.hidden_size,
        moe_intermediate_size=case.width,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=True,
    )
    return Qwen3MoeSparseMoeBlock(config)


def _olmoe(case: LayerCase) -> nn.Module:
    config = OlmoeConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.width,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=True,
    )
    return OlmoeSparseMoeBlock(config)


def _ours(case: LayerCase) -> nn.Module:
    config = MoEConfig(
        hidden_size=case.hidden_size,
        num_attention_heads=1,
        moe_intermediate_size=case.width,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    return MoESparseBlock(config)


BLOCKS = {"ours": _ours, "mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe}


class Block(LayerPeer):
    """A block of a model whose experts Transformers dispatches.

    Args:
        family: key of `BLOCKS`.
        implementation: of the experts.
        name: in the table; `FAMILY/IMPLEMENTATION` when not given.
    """

    def __init__(self, family: str, implementation: str, name: str | None = None) -> None:
        self.family, self.implementation = family, implementation
        self.name = name or f"{family}/{implementation}"

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        if (reason := unregistered(self.implementation)) is not None:
            return reason
        return too_large_for_batched_mm(case, case.tokens, device) if self.implementation == "batched_mm" else None

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        with torch.device(weights["router"].device):
            block = BLOCKS[self.family](case).to(DTYPES[case.dtype])
        block.experts.config._experts_implementation = self.implementation
        return layer_of(block, weights)


def layer_of(block: nn.Module, weights: dict[str, torch.Tensor]) -> Layer:
    """Fill a block in Transformers' layout and return it as a layer."""
    parameters = {
        "router": block.gate.weight,
        "gate_up": block.experts.gate_up_proj,
        "down": block.experts.down_proj,
    }
    for name, parameter in parameters.items():
        copy_into(parameter, weights[name])
    return Layer(
        module=block,
        forward=lambda tokens: block(tokens.unsqueeze(0)).squeeze(0),
        gradients=lambda: {name: parameter.grad for name, parameter in parameters.items()},
    )


def unregistered(implementation: str) -> str | None:
    """Return why Transformers has no such implementation of experts here, or `None`."""
    if implementation == "sonicmoe":
        try:
            is_sonicmoe_loadable(raise_error=True)
        except ImportError as error:
            return str(error)
    if implementation == "eager" or implementation in ALL_EXPERTS_FUNCTIONS:
        return None
    return f"no experts implementation {implementation!r} is registered in Transformers"


def too_large_for_batched_mm(case: LayerCase | StepCase, tokens: int, device: str, layers: int = 1) -> str | None:
    """Return why memory does not hold the weights of the experts of so many tokens at a time, or `None`."""
    rows = tokens * case.top_k
    needed = _COPIES * layers * rows * 3 * case.width * case.hidden_size * DTYPES[case.dtype].itemsize
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > _USABLE * free:
        return f"it copies weights for every token, {needed / 1e9:.0f} GB of them; {free / 1e9:.0f} GB are free"
    return None
