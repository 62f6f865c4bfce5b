"""Layouts are compared field by field and told in words; a model is what its tensors are and mean."""

from dataclasses import fields, replace

import pytest
from small import small_config

from moe_hf import MoEConfig
from moe_hf.checkpoint.topology import Topology, architecture_of, needs_conversion, what_must_stay

LAYOUT = Topology(world_size=4, expert_parallel_size=2, zero_stage=3, dtype="bfloat16")
OTHER = {
    "world_size": (2, None),
    "expert_parallel_size": (0, None),
    "zero_stage": (2, None),
    "dtype": ("float32", "the training dtype must stay bfloat16"),
    "routers": ("own", None),
    "optimizer": ("muon", "the optimizer must stay adamw"),
    "tensor_parallel_size": (2, "tensor_parallel_size must stay 1"),
    "sequence_parallel_size": (2, "sequence_parallel_size must stay 1"),
    "pipeline_parallel_size": (2, "pipeline_parallel_size must stay 1"),
}
# What training may change from one run to the next: losses, initial values, dropout, what generation uses.
NOT_PART_OF_THE_MODEL = {
    "router_aux_loss_coef": 0.5,
    "router_aux_loss_scope": "local",
    "router_z_loss_coef": 0.5,
    "router_bias_update_speed": 0.1,
    "router_jitter_noise": 0.1,
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "max_position_embeddings": 99,
    "use_cache": False,
    "output_router_logits": True,
}


def test_layouts_are_described_in_words():
    assert LAYOUT.describe() == "4 processes, ZeRO 3, EP 2, bfloat16"
    assert Topology(1, 0, -1, "float32").describe() == "1 processes, no DeepSpeed, EP off, float32"
    shared = replace(LAYOUT, tensor_parallel_size=2, pipeline_parallel_size=4, sequence_parallel_size=2)
    assert shared.describe() == "4 processes, ZeRO 3, EP 2, TP 2, SP 2, PP 4, bfloat16"
    assert LAYOUT.has_deepspeed and not Topology(1, 0, -1, "float32").has_deepspeed


@pytest.mark.parametrize("field", [field.name for field in fields(Topology)])
def test_every_field_of_a_layout_counts(field):
    value, words = OTHER[field]
    other = replace(LAYOUT, **{field: value})
    assert needs_conversion(LAYOUT, other) and not needs_conversion(LAYOUT, replace(LAYOUT))
    assert what_must_stay(LAYOUT, other) == words


@pytest.mark.parametrize("name", ["tensor_parallel_size", "sequence_parallel_size", "pipeline_parallel_size"])
def test_layouts_that_share_more_than_experts_are_not_cut_anew(name):
    shared = replace(LAYOUT, **{name: 2})
    assert what_must_stay(shared, replace(shared)) is None
    assert f"checkpoints with {name}=2 cannot be cut anew" in what_must_stay(shared, replace(shared, world_size=8))


def test_with_and_without_deepspeed():
    without = Topology(world_size=4, expert_parallel_size=0, zero_stage=-1, dtype="bfloat16")
    assert what_must_stay(LAYOUT, without) == "DeepSpeed must stay on"
    assert what_must_stay(without, LAYOUT) == "DeepSpeed must stay off"
    # Nothing is cut without DeepSpeed, so that another number of processes loads what there is.
    fewer = replace(without, world_size=2)
    assert what_must_stay(without, fewer) is None and not needs_conversion(without, fewer)


def test_architecture_is_what_tensors_are_and_mean():
    config = small_config()
    architecture = architecture_of(config)
    present = {name for name in NOT_PART_OF_THE_MODEL if hasattr(config, name)}
    assert not architecture.keys() & present
    changed = MoEConfig.from_dict(config.to_dict() | {name: NOT_PART_OF_THE_MODEL[name] for name in present})
    assert architecture_of(changed) == architecture


def test_ranks_that_share_matrices_read_the_same_rows():
    assert LAYOUT.num_data_ranks == 4
    assert replace(LAYOUT, tensor_parallel_size=2).num_data_ranks == 2
