"""Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE: routers that take a softmax over all experts."""

from typing import Any

from transformers import PreTrainedConfig

from ...configuration_moe import MoEConfig
from .base import Architecture
from .function import layer_pattern


class SoftmaxRouted(Architecture):
    """What these four share: the load-balancing loss, which they count differently from us.

    Theirs pools all layers and sums an expert's load over the K choices, so that perfect balance costs K; ours is a
    sum over the L sparse layers, each of which then costs 1.
    """

    carried = {"num_experts_per_tok": "num_experts_per_tok", "output_router_logits": "output_router_logits"}
    other_fields = ("router_aux_loss_coef",)

    def sparse_layers(self, native: PreTrainedConfig) -> list[int]:
        """Return the indices of the sparse layers."""
        return list(range(native.num_hidden_layers))

    def moe_values(self, native: PreTrainedConfig) -> dict[str, Any]:
        sparse = self.sparse_layers(native)
        if not sparse:
            return {"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False}
        step, exceptions = layer_pattern(sparse, native.num_hidden_layers)
        layers = {"moe_layer_indices": sparse} if exceptions else {"decoder_sparse_step": step}
        coefficient = native.router_aux_loss_coef * native.num_experts_per_tok / len(sparse)
        return {"router_aux_loss_coef": coefficient, "router_z_loss_coef": 0.0, **layers}

    def native_values(self, config: MoEConfig) -> dict[str, Any]:
        has_loss = config.router_balancing == "aux_loss"
        coefficient = config.router_aux_loss_coef * config.num_sparse_layers / config.num_experts_per_tok
        # Rounded, because what came from a third of theirs has to become theirs again.
        return {"router_aux_loss_coef": float(f"{coefficient:.12g}") if has_loss else 0.0}


class Mixtral(SoftmaxRouted):
    """Mixtral (Jiang et al. 2024, arXiv 2401.04088)."""

    model_type = "mixtral"
    carried = SoftmaxRouted.carried | {
        "num_local_experts": "num_experts",
        "intermediate_size": "moe_intermediate_size",
    }
    fixed = {"norm_topk_prob": True}
    neutral = {"router_jitter_noise": 0.0}
    file_names = {".mlp.": ".block_sparse_moe."}
    expert_parts = ("w1", "w3", "w2")


class Olmoe(SoftmaxRouted):
    """OLMoE: queries and keys are normalised over all heads (Muennighoff et al. 2024, arXiv 2409.02060)."""

    model_type = "olmoe"
    has_head_dim = False
    carried = SoftmaxRouted.carried | {
        "num_experts": "num_experts",
        "intermediate_size": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        "attention_bias": "attention_bias",
    }
    fixed = {"use_qk_norm": True, "qk_norm_scope": "full"}
    neutral = {"clip_qkv": None}


class QwenMoe(SoftmaxRouted):
    """What Qwen2-MoE and Qwen3-MoE share: dense layers in between."""

    carried = SoftmaxRouted.carried | {
        "num_experts": "num_experts",
        "moe_intermediate_size": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    }
    other_fields = (*SoftmaxRouted.other_fields, "decoder_sparse_step", "mlp_only_layers")

    def sparse_layers(self, native: PreTrainedConfig) -> list[int]:
        if (step := native.decoder_sparse_step) < 1:
            raise self.not_understood("decoder_sparse_step", step, "at least 1")
        candidates = range(step - 1, native.num_hidden_layers, step) if native.num_experts else ()
        return [i for i in candidates if i not in native.mlp_only_layers]

    def native_values(self, config: MoEConfig) -> dict[str, Any]:
        sparse = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        step, exceptions = layer_pattern(sparse, config.num_hidden_layers)
        return super().native_values(config) | {"decoder_sparse_step": step, "mlp_only_layers": exceptions}


class Qwen2Moe(QwenMoe):
    """Qwen2-MoE: a shared expert behind a gate, biases in q, k and v (Yang et al. 2024, arXiv 2407.10671)."""

    model_type = "qwen2_moe"
    has_head_dim = False
    carried = QwenMoe.carried | {
        "shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "qkv_bias": "attention_bias",
    }
    fixed = {"attention_output_bias": False, "shared_expert_gate": True}
    module_names = {".shared_experts.": ".shared_expert.", ".shared_experts_gate.": ".shared_expert_gate."}

    def native_values(self, config: MoEConfig) -> dict[str, Any]:
        if not config.shared_expert_intermediate_size:
            raise self.no_counterpart("shared_expert_intermediate_size", 0, "above 0")
        return super().native_values(config)


class Qwen3Moe(QwenMoe):
    """Qwen3-MoE: queries and keys are normalised per head (Yang et al. 2025, arXiv 2505.09388)."""

    model_type = "qwen3_moe"
    carried = QwenMoe.carried | {"attention_bias": "attention_bias"}
    fixed = {"use_qk_norm": True, "qk_norm_scope": "head"}
