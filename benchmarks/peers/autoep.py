"""DeepSpeed's expert-parallel layer, converted from a Mixtral block, with all experts on one process."""

import importlib.util

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

from ..cases import DTYPES, LayerCase
from .base import Layer, LayerPeer
from .blocks import layer_of

BEST_OPTIONS = {"combine_impl": "fused_weighted_sum", "row_weighting_impl": "fused"}
"""Of the section `expert_parallel`: kernels that are off by default."""


class AutoEPBlock(LayerPeer):
    """`AutoEPMoELayer` at expert-parallel size 1.

    Args:
        name: in the table.
        options: of the section `expert_parallel`, beside the size.
    """

    def __init__(self, name: str, **options) -> None:
        self.name, self.options = name, options

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        return why_no_autoep(device, self.options)

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        from deepspeed.module_inject.auto_ep import AutoEP
        from deepspeed.module_inject.auto_ep_config import parse_autoep_config
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        join_alone()
        config = MixtralConfig(
            vocab_size=8,
            hidden_size=case.hidden_size,
            intermediate_size=case.width,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_local_experts=case.num_experts,
            num_experts_per_tok=case.top_k,
        )
        with torch.device(weights["router"].device):
            model = MixtralForCausalLM(config).to(DTYPES[case.dtype])
        source = model.model.layers[0].mlp
        layer_of(source, weights)
        section = parse_autoep_config({"enabled": True, "autoep_size": 1, "preset_model": "mixtral", **self.options})
        spec = AutoEP(model, section).ep_parser()[0]
        layer = AutoEPMoELayer(spec=spec, source_module=source, ep_size=1, ep_rank=0, config=section)
        layer.to(weights["router"].device)
        layer.set_deepspeed_parallelism()
        return Layer(
            module=layer,
            forward=lambda tokens: _output(layer(tokens.unsqueeze(0))).squeeze(0),
            gradients=lambda: _gradients(layer),
        )


def why_no_autoep(device: str, options: dict) -> str | None:
    """Return why DeepSpeed's layer cannot run with the options, or `None`."""
    if importlib.util.find_spec("deepspeed") is None:
        return "the package deepspeed is not installed"
    if options and device != "cuda":
        return "its other options are Triton kernels for CUDA"
    return None


def join_alone() -> None:
    """Make this process a group of one, which DeepSpeed asks for."""
    import deepspeed

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _output(result: torch.Tensor | tuple) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _gradients(layer) -> dict[str, torch.Tensor]:
    experts = layer.experts
    return {
        "router": layer.router.gate.weight.grad,
        "gate_up": torch.cat([experts.w1.grad, experts.w3.grad], dim=1),
        "down": experts.w2.grad,
    }
