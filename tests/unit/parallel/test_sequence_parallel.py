"""What sequence parallelism refuses, and the JSON that the engine gets."""

import pytest
from small import deepspeed_json, small_config

from moe_hf.errors import ConfigError
from moe_hf.parallel.sequence_parallel import (
    as_data_parallel,
    check_block_size,
    check_sequence_parallel,
)


def shared(size: int, **sections) -> dict:
    return deepspeed_json(2, 2, sequence_parallel_size=size, **sections)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fitting"),
    [
        (4, 2, 3, "1, 2 or 4"),
        (12, 4, 3, "1, 2, 4 or 12"),
        (12, 4, 8, "1, 2, 4 or 12"),
        (3, 1, 2, "1 or 3"),
        (1, 1, 2, "1"),
    ],
)
def test_heads_that_cannot_be_shared(heads, kv_heads, size, fitting):
    model = small_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    wanted = f"={size} cannot share num_attention_heads={heads} and num_key_value_heads={kv_heads}; use {fitting}.$"
    with pytest.raises(ConfigError, match=wanted):
        check_sequence_parallel(shared(size), model, "sdpa")


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 2), (4, 2, 4), (4, 1, 2), (12, 4, 12), (8, 8, 8)])
def test_heads_that_can(heads, kv_heads, size):
    model = small_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    for attention in ("sdpa", "eager", "flash_attention_2"):
        check_sequence_parallel(shared(size), model, attention)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "attention", "sections", "message"),
    [
        (
            {},
            "flex_attention",
            {},
            "attn_implementation=flex_attention does not work with sequence_parallel_size=2",
        ),
        ({"rope_parameters": DYNAMIC}, "sdpa", {}, "rope_type='dynamic' stretches positions by the length"),
        ({"router_balancing": "sinkhorn"}, "sdpa", {}, "router_balancing='sinkhorn' compares the tokens of whole"),
        ({"router_balancing": "expert_choice"}, "sdpa", {}, "router_balancing='expert_choice' compares the tokens"),
        ({"expert_capacity_factor": 1.5}, "sdpa", {}, "expert_capacity_factor=1.5 compares the tokens of whole"),
        ({}, "sdpa", {"data_parallel_size": 2}, "data_parallel_size=2 must be left out: it follows from world_size"),
    ],
)
def test_what_would_be_computed_otherwise(changes, attention, sections, message):
    model = small_config(**changes)
    with pytest.raises(ConfigError, match=message):
        check_sequence_parallel(shared(2, **sections), model, attention)
    check_sequence_parallel(shared(1, **sections), model, attention)


def test_what_does_not_look_at_a_whole_sequence():
    for changes in (
        {"rope_parameters": YARN},
        {"router_balancing": "loss_free", "scoring_func": "sigmoid"},
        {"num_experts": 0, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 0, "shared_expert_gate": False},
    ):
        check_sequence_parallel(shared(2), small_config(**changes), "sdpa")


def test_block_size():
    for size in (1, 2, 3, 6):
        check_block_size(6, size)
    with pytest.raises(ConfigError, match="1022 is no multiple of sequence_parallel_size=4; use 1020 or 1024"):
        check_block_size(1022, 4)
    with pytest.raises(ConfigError, match=r"block_size=3 is no multiple of sequence_parallel_size=4; use 4\.$"):
        check_block_size(3, 4)


def test_the_engine_is_not_told():
    config = shared(2, train_batch_size=8)
    assert as_data_parallel(config) == deepspeed_json(2, 2) | {"train_batch_size": "auto"}
    assert config["sequence_parallel_size"] == 2 and config["train_batch_size"] == 8  # left as it was
    assert as_data_parallel(deepspeed_json(2, 2)) == deepspeed_json(2, 2)
    del config["train_batch_size"]
    assert "train_batch_size" not in as_data_parallel(config)
