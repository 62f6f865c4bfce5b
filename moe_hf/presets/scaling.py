"""Twins of presets that are small enough to train anywhere and have the same structure."""

# Besides the heads', the widths that the structure does not depend on. Multiples of 8, as grouped matrix products need.
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 128,
}
_KEY_VALUE_HEADS = 2


def scaled_down(values: dict) -> dict:
    """Return the twin of a configuration: its layers and its routing with tiny matrices.

    What shrinks are the widths, the number of heads, the vocabulary and the longest sequence. Unchanged are the number
    of layers and which of them are sparse, the query heads per key-value head, the number of experts, k, the norms and
    everything that concerns the router; so expert parallelism divides the twin as it divides the original.

    Args:
        values: keyword arguments of `MoEConfig`, with both numbers of heads among them.

    Returns:
        Keyword arguments of `MoEConfig`; no size is larger than it was.
    """
    sizes = {name: min(values[name], size) for name, size in _SIZES.items() if name in values}
    heads_per_group = values["num_attention_heads"] // values["num_key_value_heads"]
    sizes["num_key_value_heads"] = min(values["num_key_value_heads"], _KEY_VALUE_HEADS)
    sizes["num_attention_heads"] = heads_per_group * sizes["num_key_value_heads"]
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    # A multiple of 8 as well, though many heads are then together wider than the residual stream.
    sizes["head_dim"] = min(head_dim, max(8, sizes["hidden_size"] // sizes["num_attention_heads"] // 8 * 8))
    return values | sizes
