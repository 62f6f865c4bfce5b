"""Small random models of other architectures, made by Transformers' own classes, and what to compare of folders."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

# Initial weights so large that an error in any part of a layer is seen beside the residual.
SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5000.0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}

# For every case the architecture, and the fields that are not those above.
NATIVES = {
    "llama": ("llama", {"attention_bias": True, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "pad_token_id": None}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "mistral_wide_window": ("mistral", {"sliding_window": 64, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 10, "attention_bias": True, "rope_parameters": YARN}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "head_dim": 12, "rope_theta": 1e6}),
    "mixtral_tied": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}),
    "qwen2_moe_normalized": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 8, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 12, "norm_topk_prob": True, "rope_parameters": YARN}),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        {**EXPERTS, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True}),
    "olmoe_normalized": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", {**GROUPS, "head_dim": 12, "use_qk_norm": True, "num_nextn_predict_layers": 0}),
    "glm4_moe_biased": (
        "glm4_moe",
        {**GROUPS, "n_group": 1, "topk_group": 1, "attention_bias": True, "norm_topk_prob": False},
    ),
    "dots1": ("dots1", {**GROUPS, "attention_bias": True, "norm_topk_prob": True, "sliding_window": None}),
    "dots1_all_sparse": ("dots1", {**GROUPS, "first_k_dense_replace": 0, "n_shared_experts": 1, "head_dim": 6}),
}


def native_config(name: str, **changes) -> PreTrainedConfig:
    model_type, own = NATIVES[name]
    values = SHARED | own | changes
    if isinstance(values.get("rope_parameters"), dict):
        values["rope_parameters"] = dict(values["rope_parameters"])
    return CONFIG_MAPPING[model_type](**values)


def native_model(name: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(native_config(name, **changes), dtype=torch.float32).eval()
    randomize(model)
    return model


def randomize(model: PreTrainedModel) -> None:
    """Give norms, biases and the routers' correction biases values that matter: they start as ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    vectors = [p for p in model.parameters() if p.ndim == 1]
    vectors += [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for vector in vectors:
            vector.copy_(0.5 + torch.rand(vector.shape, generator=generator))


def tokens() -> torch.Tensor:
    return torch.randint(SHARED["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(tokens()).logits


def load(folder: Path, model_type: str | None = None, **options) -> PreTrainedModel:
    """Load a folder with the classes that are installed, and look that nothing was missing or too much."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert model_type in (None, model.config.model_type)
    return model


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_files(actual: Path, expected: Path) -> None:
    """Compare the weights of two folders bit by bit, however they are cut into files."""
    actual_tensors, expected_tensors = read_files(actual), read_files(expected)
    assert actual_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        other = actual_tensors[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
