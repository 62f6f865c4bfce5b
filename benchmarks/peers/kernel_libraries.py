"""Libraries of CUDA kernels for sparse blocks: Liger, SonicMoE, ScatterMoE, MegaBlocks, Tutel.

Each has its own router, or takes what a plain one chooses. Their weights are reordered when a layer is built.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..cases import DTYPES, LayerCase
from .autoep import join_alone
from .base import Layer, LayerPeer, copy_into, needs_cuda_package
from .blocks import BLOCKS, layer_of


class LigerBlock(LayerPeer):
    """A block of Transformers whose experts are Liger's fused ones (linkedin/Liger-Kernel)."""

    def __init__(self, family: str) -> None:
        self.family, self.name = family, f"{family}/liger"

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        return needs_cuda_package("liger_kernel", device)

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        from liger_kernel.transformers.swiglu import LigerExperts

        with torch.device(weights["router"].device):
            block = BLOCKS[self.family](case)
            block.experts = LigerExperts(block.experts.config)
        return layer_of(block.to(DTYPES[case.dtype]), weights)


class SonicMoEBlock(LayerPeer):
    """SonicMoE (Guo et al. 2025, arXiv 2512.14080), its own router included."""

    name = "sonicmoe"

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        return needs_cuda_package("sonicmoe", device) or needs_cuda_package("quack", device)

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        from sonicmoe import MoE, moe_TC_softmax_topk_layer
        from sonicmoe.enums import ActivationType

        layer = MoE(case.num_experts, case.top_k, case.hidden_size, case.width, ActivationType.SWIGLU, False, 0.02)
        layer.to(weights["router"].device, DTYPES[case.dtype])
        copy_into(layer.router.weight, weights["router"])
        # Gates and ups in turn.
        gate, up = weights["gate_up"].chunk(2, dim=1)
        copy_into(layer.c_fc.weight, torch.stack([gate, up], dim=2).flatten(1, 2))
        copy_into(layer.c_proj.weight, weights["down"])

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            # As its own `forward`, without the balancing loss that nobody else computes here.
            return moe_TC_softmax_topk_layer(
                tokens,
                layer.router.weight,
                layer.c_fc.weight.permute(1, 2, 0),
                None,
                layer.c_proj.weight.permute(1, 2, 0),
                None,
                layer.top_k,
                layer.stream_id,
                layer.activation_function,
                False,
            )[0]

        def gradients() -> dict[str, torch.Tensor]:
            pairs = layer.c_fc.weight.grad
            gate_up = torch.cat([pairs[:, 0::2], pairs[:, 1::2]], dim=1)
            return {"router": layer.router.weight.grad, "gate_up": gate_up, "down": layer.c_proj.weight.grad}

        return Layer(layer, forward, gradients)


class ScatterMoEBlock(LayerPeer):
    """ScatterMoE (Tan et al. 2024, arXiv 2403.08245) behind Mixtral's router."""

    name = "scattermoe"

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        return needs_cuda_package("scattermoe", device)

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        from scattermoe.mlp import GLUMLP

        device = weights["router"].device
        experts = GLUMLP(case.hidden_size, case.width, case.num_experts, case.top_k, activation=nn.SiLU())
        with torch.device(device):
            router = BLOCKS["mixtral"](case).gate
        module = nn.ModuleDict({"router": router, "experts": experts}).to(device, DTYPES[case.dtype])
        copy_into(router.weight, weights["router"])
        # Ups before gates.
        copy_into(experts.experts.weight, torch.cat(weights["gate_up"].chunk(2, dim=1)[::-1], dim=1))
        copy_into(experts.output_experts.weight, weights["down"])

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            _, top_k_weights, top_k_index = router(tokens)
            return experts(tokens, top_k_weights.to(tokens.dtype), top_k_index)

        def gradients() -> dict[str, torch.Tensor]:
            gate_up = torch.cat(experts.experts.weight.grad.chunk(2, dim=1)[::-1], dim=1)
            return {"router": router.weight.grad, "gate_up": gate_up, "down": experts.output_experts.weight.grad}

        return Layer(module, forward, gradients)


class MegaBlocksBlock(LayerPeer):
    """MegaBlocks' dropless layer (Gale et al. 2023, arXiv 2211.15841) with grouped matrix products."""

    name = "megablocks"

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        if case.dtype != "bf16":
            return "its grouped matrix products are of 16 bits"
        return needs_cuda_package("megablocks", device) or needs_cuda_package("grouped_gemm", device)

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        arguments = Arguments(
            hidden_size=case.hidden_size,
            ffn_hidden_size=case.width,
            bias=False,
            return_bias=False,
            activation_fn=F.silu,
            moe_num_experts=case.num_experts,
            moe_top_k=case.top_k,
            moe_normalize_expert_weights=1,
            memory_optimized_mlp=True,
            mlp_type="glu",
            mlp_impl="grouped",
            fp16=False,
            bf16=True,
            device=weights["router"].device,
        )
        layer = dMoE(arguments)
        mlp, router = layer.experts.mlp, layer.router.layer.weight
        copy_into(router, weights["router"])
        gate, up = weights["gate_up"].chunk(2, dim=1)
        copy_into(mlp.w1, gate.flatten(0, 1))
        copy_into(mlp.v1, up.flatten(0, 1))
        copy_into(mlp.w2, weights["down"].transpose(1, 2).flatten(0, 1))

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            from megablocks.layers.moe import clear_load_balancing_loss

            clear_load_balancing_loss()  # or it would collect what every call has recorded
            output = layer(tokens.unsqueeze(1))
            return (output[0] if isinstance(output, tuple) else output).squeeze(1)

        def gradients() -> dict[str, torch.Tensor]:
            by_expert = [w.grad.view(case.num_experts, case.width, case.hidden_size) for w in (mlp.w1, mlp.v1, mlp.w2)]
            gate_up = torch.cat(by_expert[:2], dim=1)
            return {"router": router.grad, "gate_up": gate_up, "down": by_expert[2].transpose(1, 2)}

        return Layer(layer, forward, gradients)


class TutelBlock(LayerPeer):
    """Tutel's layer (Hwang et al. 2022, arXiv 2206.03382), with room for all tokens of the fullest expert."""

    name = "tutel"

    def unavailable(self, case: LayerCase, device: str) -> str | None:
        return needs_cuda_package("tutel", device)

    def build(self, case: LayerCase, weights: dict[str, torch.Tensor]) -> Layer:
        from tutel import moe

        join_alone()
        layer = moe.moe_layer(
            gate_type={"type": "top", "k": case.top_k, "capacity_factor": 0.0, "normalize_gate": True},
            experts={
                "type": "llama_ffn",
                "num_experts_per_device": case.num_experts,
                "hidden_size_per_expert": case.width,
            },
            model_dim=case.hidden_size,
            is_gshard_loss=False,
        ).to(weights["router"].device, DTYPES[case.dtype])
        router, experts = layer.gates[0].wg.weight, layer.experts
        gate, up = (half.transpose(1, 2) for half in weights["gate_up"].chunk(2, dim=1))
        copy_into(router, weights["router"].to(router.dtype))
        for parameter, value in ((experts.W_fc1, gate), (experts.W_fc2, up), (experts.W_fc3, weights["down"].mT)):
            copy_into(parameter, value.reshape(parameter.shape))

        def gradients() -> dict[str, torch.Tensor]:
            outer = (case.num_experts, case.hidden_size, case.width)
            gate, up = (w.grad.view(outer).transpose(1, 2) for w in (experts.W_fc1, experts.W_fc2))
            down = experts.W_fc3.grad.view(case.num_experts, case.width, case.hidden_size).transpose(1, 2)
            return {"router": router.grad, "gate_up": torch.cat([gate, up], dim=1), "down": down}

        return Layer(layer, layer, gradients)
