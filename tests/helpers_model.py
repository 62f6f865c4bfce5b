"""Small models, and slow reference computations written from the formulas, that the model's tests share.

Nothing below calls the code under test to compute an expected value: sequences are processed token by token, head by
head and expert by expert, in float64.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_hf import MoEConfig, MoEForCausalLM

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    # At the usual 0.02 the experts' output is so small beside the residual that errors in it cannot be seen.
    "initializer_range": 0.3,
}


def tiny_config(**changes) -> MoEConfig:
    return MoEConfig(**{**TINY, **changes})


def randomize_vectors(model: torch.nn.Module, seed: int = 1) -> None:
    """Give norms and biases values that matter: they start as ones and zeros, which hide a missing multiplication."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))


def tiny_model(seed: int = 0, **changes) -> MoEForCausalLM:
    torch.manual_seed(seed)
    model = MoEForCausalLM(tiny_config(**changes))
    randomize_vectors(model)
    return model.eval()


def random_ids(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (batch_size, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected value."""
    assert actual.shape == expected.shape
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} is above {tolerance:.0e}"


# --------------------------------------------------------------------------------------------------------------------
# Routing


def reference_probabilities(logits: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def reference_route(
    logits: list[float], top_k: int, normalize: bool = True, scale: float = 1.0, bias: list[float] | None = None
) -> tuple[list[int], list[float]]:
    """Return one token's experts, best first, and their weights."""
    scores = reference_probabilities(logits)
    ranking = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    chosen = sorted(range(len(scores)), key=lambda expert: -ranking[expert])[:top_k]
    total = sum(scores[expert] for expert in chosen) if normalize else 1.0
    return chosen, [scores[expert] / total * scale for expert in chosen]


def reference_aux_loss(
    logits: list[list[float]], chosen: list[list[int]], mask: list[bool], loads_from: tuple | None = None
) -> float:
    """Return `E * sum_i f_i * P_i` over the unmasked tokens; `loads_from` counts `f` over another (chosen, mask)."""
    num_experts = len(logits[0])
    counted, counted_mask = loads_from or (chosen, mask)
    assignments = [e for experts, keep in zip(counted, counted_mask, strict=True) if keep for e in experts]
    kept = [reference_probabilities(row) for row, keep in zip(logits, mask, strict=True) if keep]
    total = 0.0
    for expert in range(num_experts):
        load = assignments.count(expert) / len(assignments)
        probability = sum(row[expert] for row in kept) / len(kept)
        total += load * probability
    return num_experts * total


def reference_z_loss(logits: list[list[float]], mask: list[bool]) -> float:
    """Return the mean of `log(sum(exp(logits))) ** 2` over the unmasked tokens."""
    kept = [math.log(sum(math.exp(x) for x in row)) ** 2 for row, keep in zip(logits, mask, strict=True) if keep]
    return sum(kept) / len(kept)


# --------------------------------------------------------------------------------------------------------------------
# The decoder


def rope_frequencies(rotary_dim: int, theta: float = 10_000.0) -> list[float]:
    return [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]


def reference_logits(
    model: MoEForCausalLM, token_ids: list[int], frequencies: list[float] | None = None
) -> torch.Tensor:
    """Return the logits `(S, V)`, in float64, that `model`'s weights and configuration mean for one sequence."""
    config = model.config
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    frequencies = frequencies or rope_frequencies(config.head_dim)
    tokens = [weights["model.embed_tokens.weight"][i] for i in token_ids]
    for layer in range(config.num_hidden_layers):
        part = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"model.layers.{layer}." in k}
        normed = [_rms_norm(x, part["input_layernorm.weight"], config) for x in tokens]
        tokens = [x + y for x, y in zip(tokens, _attention(normed, part, config, frequencies), strict=True)]
        normed = [_rms_norm(x, part["post_attention_layernorm.weight"], config) for x in tokens]
        tokens = [x + _feed_forward(y, part, config) for x, y in zip(tokens, normed, strict=True)]
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return torch.stack([head @ _rms_norm(x, weights["model.norm.weight"], config) for x in tokens])


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + config.rms_norm_eps) * weight


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gated = gate @ x
    return down @ (gated / (1 + torch.exp(-gated)) * (up @ x))


def _rotate(x: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """Turn the pair (x_i, x_{i + n}) by `position * frequencies[i]`, n being the number of frequencies."""
    x, n = x.clone(), len(frequencies)
    for i, frequency in enumerate(frequencies):
        turned = complex(x[i], x[i + n]) * complex(math.cos(position * frequency), math.sin(position * frequency))
        x[i], x[i + n] = turned.real, turned.imag
    return x


def _project(x: torch.Tensor, part: dict, name: str) -> torch.Tensor:
    projected = part[f"self_attn.{name}_proj.weight"] @ x
    return projected + part.get(f"self_attn.{name}_proj.bias", 0.0)


def _attention(tokens: list[torch.Tensor], part: dict, config: MoEConfig, frequencies: list[float]) -> list:
    heads, size = config.num_attention_heads, config.head_dim
    queries, keys, values, outputs = [], [], [], []
    for position, x in enumerate(tokens):
        query, key, value = (_project(x, part, name) for name in "qkv")
        if config.use_qk_norm and config.qk_norm_scope == "full":
            query = _rms_norm(query, part["self_attn.q_norm.weight"], config)
            key = _rms_norm(key, part["self_attn.k_norm.weight"], config)
        query, key, value = (list(y.split(size)) for y in (query, key, value))
        if config.use_qk_norm and config.qk_norm_scope == "head":
            query = [_rms_norm(y, part["self_attn.q_norm.weight"], config) for y in query]
            key = [_rms_norm(y, part["self_attn.k_norm.weight"], config) for y in key]
        queries.append([_rotate(y, position, frequencies) for y in query])
        keys.append([_rotate(y, position, frequencies) for y in key])
        values.append(value)
    for position, x in enumerate(tokens):
        output = []
        for head in range(heads):
            shared = head // (heads // config.num_key_value_heads)
            scores = [
                float(queries[position][head] @ keys[past][shared]) / math.sqrt(size) for past in range(position + 1)
            ]
            attended = reference_probabilities(scores)
            output.append(sum(p * values[past][shared] for past, p in enumerate(attended)))
        if config.attention_gate is not None:
            gate = 1 / (1 + torch.exp(-(part["self_attn.gate_proj.weight"] @ x)))
            gates = gate.split(1 if config.attention_gate == "headwise" else size)
            output = [y * g for y, g in zip(output, gates, strict=True)]
        outputs.append(_project(torch.cat(output), part, "o"))
    return outputs


def _feed_forward(x: torch.Tensor, part: dict, config: MoEConfig) -> torch.Tensor:
    if "mlp.gate.weight" not in part:
        return _swiglu(x, *(part[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    chosen, routing_weights = reference_route(
        (part["mlp.gate.weight"] @ x).tolist(),
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    output, width = torch.zeros_like(x), config.moe_intermediate_size
    for expert, weight in zip(chosen, routing_weights, strict=True):
        gate_up = part["mlp.experts.gate_up_proj"][expert]
        down = part["mlp.experts.down_proj"][expert]
        output = output + weight * _swiglu(x, gate_up[:width], gate_up[width:], down)
    if config.shared_expert_intermediate_size:
        shared = _swiglu(x, *(part[f"mlp.shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
        if config.shared_expert_gate:
            shared = shared / (1 + math.exp(-float(part["mlp.shared_experts_gate.weight"][0] @ x)))
        output = output + shared
    return output


class Dispatched(TorchDispatchMode):
    """Counts the operators that are called, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
