"""What sequence parallelism can be asked for, and the DeepSpeed JSON of a run that has it."""

from __future__ import annotations

import copy

from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from .deepspeed_config import Config, mistake
from .parallel_sizes import parallel_sizes

KEY = "sequence_parallel_size"

# Attention functions that take a mask of any form, or the borders of documents, and that were compared with one process
# (flash attention by its arguments alone: its kernels need a GPU).
_IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")

# Their frequencies depend on the largest position that a rank sees, which differs between the pieces of a sequence.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


def check_sequence_parallel(config: Config, model: MoEConfig, attn_implementation: str) -> None:
    """Refuse what sequence parallelism would compute otherwise than one process, or not at all.

    Args:
        config: the DeepSpeed JSON, with the sizes from the command line already in it.
        model: that is trained.
        attn_implementation: that it attends with.

    Raises:
        ConfigError: with the first mistake found.
    """
    size = parallel_sizes(config).sequence
    if size == 1:
        return
    _check_heads(size, model)
    if attn_implementation not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"attn_implementation={attn_implementation} does not work with {KEY}={size}; use sdpa, flash_attention_2, "
            "flash_attention_3 or eager."
        )
    if (rope_type := model.rope_parameters["rope_type"]) in _ROPE_BY_LENGTH:
        raise ConfigError(
            f"rope_type={rope_type!r} stretches positions by the length that a rank sees, which {KEY}={size} cuts; "
            "use 'yarn', 'llama3', 'linear' or 'default'."
        )
    _check_tokens_are_routed_alone(size, model)
    readers = config.get("data_parallel_size")
    if readers is not None:
        raise mistake("data_parallel_size", readers, f"must be left out: it follows from world_size and {KEY}={size}")


def _check_heads(size: int, model: MoEConfig) -> None:
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if _shares_heads(size, heads, kv_heads):
        return
    fitting = [str(other) for other in range(1, heads + 1) if _shares_heads(other, heads, kv_heads)]
    raise ConfigError(
        f"{KEY}={size} cannot share num_attention_heads={heads} and num_key_value_heads={kv_heads}; "
        f"use {' or '.join([', '.join(fitting[:-1]), fitting[-1]] if len(fitting) > 1 else fitting)}."
    )


def _shares_heads(size: int, heads: int, kv_heads: int) -> bool:
    """Whether each of `size` ranks gets as many heads, and whole ones of keys, repeated where there are fewer."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _check_tokens_are_routed_alone(size: int, model: MoEConfig) -> None:
    """Refuse routing that compares the tokens of one rank: which tokens these are would depend on the size."""
    if model.num_sparse_layers == 0:
        return
    together = None
    if model.router_balancing in ("sinkhorn", "expert_choice"):
        together = f"router_balancing={model.router_balancing!r}"
    elif model.expert_capacity_factor is not None:
        together = f"expert_capacity_factor={model.expert_capacity_factor}"
    if together is not None:
        raise ConfigError(
            f"{together} compares the tokens of whole sequences, which {KEY}={size} cuts into pieces; use "
            f"router_balancing='aux_loss' or 'loss_free' without a capacity, or {KEY}=1."
        )


def check_block_size(block_size: int, size: int) -> None:
    """Refuse rows that cannot be cut into pieces of one length.

    Raises:
        ConfigError: naming the nearest lengths that can.
    """
    if block_size % size:
        below, above = block_size // size * size, -(-block_size // size) * size
        nearest = f"{below} or {above}" if below else above
        raise ConfigError(f"block_size={block_size} is no multiple of {KEY}={size}; use {nearest}.")


def as_data_parallel(config: Config) -> Config:
    """Return the DeepSpeed JSON that the engine is given: to it all ranks are data-parallel (see `ulysses`).

    Its `train_batch_size` then counts pieces, `sequence_parallel_size` for every row.
    """
    if parallel_sizes(config).sequence == 1:
        return config
    config = copy.deepcopy(config)
    del config[KEY]
    if "train_batch_size" in config:
        config["train_batch_size"] = "auto"  # it was compared with the flags
    return config
