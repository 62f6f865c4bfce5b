"""Architectures of Transformers in which a `moe_hf` model can be said, and that can be said in `moe_hf`.

A new one is a class, most of it tables, in the file of its family, and its name in `_ALL`.
"""

from ...errors import ConfigError
from .base import Architecture
from .dense import Llama, Mistral, Qwen2, Qwen3
from .sigmoid import Dots1, Glm4Moe
from .softmax import Mixtral, Olmoe, Qwen2Moe, Qwen3Moe

__all__ = ["Architecture", "get", "names"]

_ALL = (Mixtral, Qwen2Moe, Qwen3Moe, Olmoe, Glm4Moe, Dots1, Llama, Mistral, Qwen2, Qwen3)
_BY_NAME = {architecture.model_type: architecture() for architecture in _ALL}

_LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "longcat_flash")


def names() -> list[str]:
    """Return the `model_type` of every architecture that can be converted, `moe_hf` itself not among them."""
    return list(_BY_NAME)


def get(model_type: str) -> Architecture:
    """Return an architecture by its `model_type`.

    Raises:
        ConfigError: there is none of that name, or it has something that ours has not.
    """
    if model_type in _LATENT_ATTENTION:
        raise ConfigError(f"{model_type} has multi-head latent attention, which moe_hf has not: it is not converted.")
    if model_type not in _BY_NAME:
        raise ConfigError(f"{model_type!r} cannot be converted; known are moe_hf, {', '.join(names())}.")
    return _BY_NAME[model_type]
