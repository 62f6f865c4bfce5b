"""Bytes that a rank keeps and needs between a forward pass and its backward pass.

What autograd saves was counted tensor by tensor with its hooks, in our own layers and in AutoEP's, in the manner of
Korthikanti et al. 2022 (arXiv 2205.05198, section 4); their 34 s b h is of another layer: with LayerNorm, dropout, an
MLP of four times the width, and norms in 16 bits. Attention is a fused kernel, which saves no s x s matrix.

Letters in the formulas: b bytes of an element, H hidden size, I inner width, E experts, K experts of a token.
"""

import math
from collections.abc import Iterator

from ..configuration_moe import MoEConfig
from .memory import COMPUTING, Amount
from .setting import Setting

# Logits that the head has at one time, as `linear_cross_entropy` says.
MAX_LOGITS = 2**25

# Rows by which AutoEP rounds up what each local expert gets (`TOKEN_GROUP_ALIGN_SIZE_M`).
_EXPERT_ROWS = 8


def activation_amounts(config: MoEConfig, setting: Setting) -> list[Amount]:
    """Return the memory of one micro-batch at its fullest: in the backward pass of a layer, or in the head.

    Experts are taken to get equal shares of the tokens.
    """
    return [Amount("activations", name, math.ceil(size), when=COMPUTING) for name, size in _parts(config, setting)]


def _parts(config: MoEConfig, setting: Setting) -> Iterator[tuple[str, float]]:
    layers = {kind: saved_by_layer(config, setting, kind == "sparse") for kind in set(config.mlp_layer_types)}
    if setting.checkpointing:
        inputs = setting.item_size * config.hidden_size * setting.tokens * config.num_hidden_layers
        yield "inputs of the layers", inputs
        # The results of top-k, which are not computed again.
        yield "choices of the routers", 12 * config.num_experts_per_tok * setting.tokens * config.num_sparse_layers
    else:
        yield "saved by the layers", sum(layers[kind] for kind in config.mlp_layer_types)
    # Logits, probabilities and choices of all layers, for the routers' losses.
    recorded = 8 * (config.num_experts + config.num_experts_per_tok)
    yield "router logits", recorded * setting.tokens * config.num_sparse_layers
    yield "saved by the head", _saved_by_head(config, setting)
    recomputed = {kind: size if setting.checkpointing else 0 for kind, size in layers.items()}
    of_layer = max(recomputed[kind] + _working(config, setting, kind == "sparse") for kind in layers)
    # The head has let go of its own when layers run backward.
    yield (
        "one layer, backward" if of_layer >= _head(config, setting) else "the head",
        max(of_layer, _head(config, setting)),
    )


def saved_by_layer(config: MoEConfig, setting: Setting, sparse: bool) -> float:
    """Return what autograd saves in one decoder layer, in bytes.

    Args:
        config: of the model.
        setting: how it is trained.
        sparse: whether the layer has experts.
    """
    b, hidden = setting.item_size, config.hidden_size
    result = b * hidden  # of a norm, which projections save
    per_token = 2 * _norm(hidden, 1, b) + result + _attention(config, setting)
    if not sparse:
        return setting.tokens * (per_token + result + 4 * b * config.intermediate_size / setting.tp_size)
    if shared := config.shared_expert_intermediate_size:
        per_token += result + 4 * b * shared / setting.tp_size
        per_token += b * (hidden + 2) if config.shared_expert_gate else 0
    else:
        per_token += result  # the input of the router, and of experts that are all here
    # Scores of the router, its choices and their weights.
    per_token += 4 * config.num_experts + 12 * config.num_experts_per_tok + 4
    return setting.tokens * per_token + _experts(config, setting)


def _norm(width: int, rows: int, b: int) -> int:
    """Of one token: the input in FP32, the result before its weight, and the inverse norms."""
    return (4 + b) * width + 4 * rows


def _attention(config: MoEConfig, setting: Setting) -> float:
    """Of one token: queries, keys, values, output, and the logarithms of the kernel's sums."""
    b = setting.item_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, kv_heads * config.head_dim
    size = 2 * b * (queries + keys) + 4 * heads
    if config.use_qk_norm:
        per_head = config.qk_norm_scope == "head"
        size += _norm(queries, heads if per_head else 1, b) + _norm(keys, kv_heads if per_head else 1, b)
    if config.attention_gate is not None:
        size += b * (queries + (queries if config.attention_gate == "elementwise" else heads))
    return size / setting.tp_size


def _experts(config: MoEConfig, setting: Setting) -> float:
    """Of all tokens: what the kernel keeps, products with gate and up; what its rows are, and indices."""
    b, hidden, inner = setting.item_size, config.hidden_size, config.moe_intermediate_size
    rows = setting.tokens * config.num_experts_per_tok
    if setting.ep_size and setting.tp_size > 1:
        return _experts_of_autoep(config, setting)
    computed = rows * (8 + 2 * b * inner) + 4 * config.num_experts / max(setting.ep_size, 1)
    if setting.ep_size <= 1:
        return computed
    # Rows as they have come, as they have come back, and where these belong.
    return computed + rows * (8 + 2 * b * hidden)


def _experts_of_autoep(config: MoEConfig, setting: Setting) -> float:
    """As above in AutoEP's own layer, with its activations and their product, and padded for each local expert."""
    b, hidden, inner = setting.item_size, config.hidden_size, config.moe_intermediate_size
    rows = setting.tokens * config.num_experts_per_tok / setting.tp_size
    padded = rows + _EXPERT_ROWS * config.num_experts / setting.ep_size
    return rows * (20 + b * hidden) + padded * (4 + b * hidden + 4 * b * inner)


def _working(config: MoEConfig, setting: Setting, sparse: bool) -> float:
    """Estimate the gradients of activations that exist at one time while a layer runs backward.

    Those of experts are of all rows, as on a GPU; on a CPU only one expert's are there at one time.
    """
    b, hidden = setting.item_size, config.hidden_size
    if not sparse:
        # What was saved of the MLP is let go of while its gradients come.
        return setting.tokens * b * (2 * hidden + config.intermediate_size / setting.tp_size)
    rows = setting.tokens * config.num_experts_per_tok / setting.tp_size
    return rows * b * (hidden + 3 * config.moe_intermediate_size)


def _saved_by_head(config: MoEConfig, setting: Setting) -> float:
    """Of the last norm, and the gradients that our head computes in the forward pass: of its input, of its weight."""
    b, hidden = setting.item_size, config.hidden_size
    return setting.tokens * (_norm(hidden, 1, b) + 2 * b * hidden) + 4 * config.vocab_size * hidden


def _head(config: MoEConfig, setting: Setting) -> float:
    """Return what the head needs besides: logits and probabilities of a chunk, the weight's gradient in 16 bits."""
    b = setting.item_size
    chunk = min(setting.tokens, max(1, MAX_LOGITS // config.vocab_size))
    rounded = b * config.vocab_size * config.hidden_size if setting.reduced_precision else 0
    return chunk * config.vocab_size * (4 + b) + rounded
