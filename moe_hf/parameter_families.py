"""Which family a parameter belongs to, by its Hugging Face name or the one that AutoEP gives it."""

FAMILIES = ("attention", "dense_mlp", "experts", "router", "embeddings", "norms")
"""The parts of the model whose gradients are reported apart; every parameter belongs to exactly one."""


def family_of(name: str) -> str:
    """Return the family, one of `FAMILIES`, of the parameter called `name`.

    Norms are a family wherever they stand, also inside attention. Shared experts and the gate that scales them run for
    every token, so they count as `dense_mlp`.

    Args:
        name: such as `model.layers.1.mlp.gate.weight`; what wrappers put before it does not matter.

    Raises:
        ValueError: the model has no parameter of that name.
    """
    modules = name.split(".")[:-1]
    if any(module.endswith("norm") for module in modules):
        return "norms"
    if "self_attn" in modules:
        return "attention"
    if "mlp" in modules:
        return _family_in_mlp(name.split(".mlp.")[1].split("."))
    if "embed_tokens" in modules or "lm_head" in modules:
        return "embeddings"
    raise ValueError(f"{name} belongs to none of the families {', '.join(FAMILIES)}; say in family_of which it is")


def is_router_weight(name: str) -> bool:
    """Return whether a parameter is the weight of a router, in an engine or in an exported model."""
    return name.endswith(".weight") and family_of(name) == "router"


def _family_in_mlp(path: list[str]) -> str:
    if path[0] == "experts":
        return "experts"
    return "router" if path[0] in ("gate", "router") else "dense_mlp"
