"""FLOPs of one token in training."""

import functools
import json
from dataclasses import dataclass

from ..checkpoint.model_card import ParameterCount, active_parameters
from ..configuration_moe import MoEConfig


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of training on one token, forward and backward, without recomputation.

    Args:
        matmul: in the matrices that one token passes: 2 for each parameter forward, 4 backward.
        attention: in the products of queries with keys and of attention weights with values.
    """

    matmul: int
    attention: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.matmul + self.attention


def flops_per_token(config: MoEConfig, sequence_length: int) -> TokenFlops:
    """Count the FLOPs of one token in training; only what a token really passes, so only its k experts.

    Both products of attention cost 2 FLOPs for each query, key, head and element of a head: 4 S h d for a token, half
    of it where attention is causal, and twice as much again backward: 3 * (4 S h d / 2) = 6 S h d for each layer. As
    in the PaLM paper (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), which does not halve it. Packed rows count
    as a whole, although attention does not cross their documents.

    Args:
        config: of the model.
        sequence_length: tokens of a row (S).
    """
    return TokenFlops(
        matmul=6 * count_parameters(config).in_matrices,
        attention=6 * config.num_hidden_layers * sequence_length * config.num_attention_heads * config.head_dim,
    )


def count_parameters(config: MoEConfig) -> ParameterCount:
    """Count a model's parameters, as `active_parameters` does, but only once: a search asks often."""
    return _count(config.to_json_string())


@functools.lru_cache(maxsize=4)
def _count(text: str) -> ParameterCount:
    return active_parameters(MoEConfig.from_dict(json.loads(text)))
