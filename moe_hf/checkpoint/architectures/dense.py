"""Llama, Mistral, Qwen2 and Qwen3: what a model without experts is."""

from .base import Architecture


class Llama(Architecture):
    """Llama (Touvron et al. 2023, arXiv 2302.13971)."""

    model_type = "llama"
    is_sparse = False
    carried = {"attention_bias": "attention_bias"}
    fixed = {"num_experts": 0}
    neutral = {"mlp_bias": False}


class Mistral(Architecture):
    """Mistral without a sliding window (Jiang et al. 2023, arXiv 2310.06825)."""

    model_type = "mistral"
    is_sparse = False
    fixed = {"num_experts": 0}
    neutral = {"sliding_window": None}


class Qwen2(Architecture):
    """Qwen2: biases in q, k and v only (Yang et al. 2024, arXiv 2407.10671)."""

    model_type = "qwen2"
    is_sparse = False
    has_head_dim = False
    fixed = {"num_experts": 0, "attention_bias": True, "attention_output_bias": False}


class Qwen3(Architecture):
    """Qwen3: queries and keys are normalised per head (Yang et al. 2025, arXiv 2505.09388)."""

    model_type = "qwen3"
    is_sparse = False
    carried = {"attention_bias": "attention_bias"}
    fixed = {"num_experts": 0, "use_qk_norm": True, "qk_norm_scope": "head"}
