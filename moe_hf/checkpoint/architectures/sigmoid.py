"""GLM-4-MoE and dots1: the router of DeepSeek-V3 (arXiv 2412.19437) with grouped-query attention."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from ...configuration_moe import MoEConfig
from ..export import expected_tensors
from .base import Architecture


class SigmoidRouted(Architecture):
    """Sigmoid scores, a correction bias in every router, groups, dense layers first, shared experts without a gate."""

    carried = {
        "num_experts_per_tok": "num_experts_per_tok",
        "n_routed_experts": "num_experts",
        "moe_intermediate_size": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        "routed_scaling_factor": "routed_scaling_factor",
        "attention_bias": "attention_bias",
    }
    fixed = {
        "qk_norm_scope": "head",
        "scoring_func": "sigmoid",
        "group_scoring_func": "top2_sum",
        "router_balancing": "loss_free",
        "router_z_loss_coef": 0.0,
    }
    other_fields = ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "output_router_logits")

    def moe_values(self, native: PreTrainedConfig) -> dict[str, Any]:
        num_groups, first = native.n_group or 1, native.first_k_dense_replace or 0
        if first >= native.num_hidden_layers:
            raise self.not_understood("first_k_dense_replace", first, f"below {native.num_hidden_layers}")
        if not native.n_shared_experts:
            raise self.not_understood("n_shared_experts", native.n_shared_experts, "at least 1")
        if native.n_routed_experts < 2 * num_groups:
            raise self.not_understood("n_group", num_groups, "at most n_routed_experts / 2")
        return {
            "n_group": num_groups,
            "topk_group": native.topk_group or 1,
            "first_k_dense_replace": first,
            "shared_expert_intermediate_size": native.n_shared_experts * native.moe_intermediate_size,
        }

    def native_values(self, config: MoEConfig) -> dict[str, Any]:
        num_shared = config.shared_expert_intermediate_size // config.moe_intermediate_size
        if not num_shared:
            width, needed = config.shared_expert_intermediate_size, "a multiple of moe_intermediate_size"
            raise self.no_counterpart("shared_expert_intermediate_size", width, needed)
        if config.num_experts == 1:
            raise self.no_counterpart("num_experts", 1, "at least 2")
        is_limited = config.topk_group < config.n_group
        return {
            "n_group": config.n_group if is_limited else 1,
            "topk_group": config.topk_group if is_limited else 1,
            "n_shared_experts": num_shared,
            "first_k_dense_replace": config.mlp_layer_types.index("sparse"),
            "routed_scaling_factor": float(config.routed_scaling_factor),
        }

    def expected_tensors(self, config: MoEConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        with_bias = MoEConfig.from_dict(config.to_dict() | {"router_balancing": "loss_free"})
        return expected_tensors(with_bias, dtype)


class Glm4Moe(SigmoidRouted):
    """GLM-4.5 (Zeng et al. 2025, arXiv 2508.06471)."""

    model_type = "glm4_moe"
    rotates_part = True
    carried = SigmoidRouted.carried | {"use_qk_norm": "use_qk_norm"}
    fixed = SigmoidRouted.fixed | {"attention_output_bias": False}
    other_fields = (*SigmoidRouted.other_fields, "num_mtp_layers", "num_nextn_predict_layers")

    def native_values(self, config: MoEConfig) -> dict[str, Any]:
        return super().native_values(config) | {"num_nextn_predict_layers": 0}

    def left_out(self, native: PreTrainedConfig) -> list[str]:
        # Layers after the last, which predict tokens further ahead, for speculative decoding.
        count = getattr(native, "num_nextn_predict_layers", None) or 0
        return [rf"model\.layers\.{native.num_hidden_layers + i}\..*" for i in range(count)]


class Dots1(SigmoidRouted):
    """dots.llm1 (Huo et al. 2025, arXiv 2506.05767)."""

    model_type = "dots1"
    fixed = SigmoidRouted.fixed | {"use_qk_norm": True}
    neutral = {"sliding_window": None}
