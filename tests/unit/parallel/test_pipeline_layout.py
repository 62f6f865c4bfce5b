"""Which stage holds what, for any number of stages and any way to cut."""

import pytest
from small import small_config

from moe_hf.parallel.pipeline_layout import PARTITIONS, PipelineLayout, plan_pipeline

NAMES = [
    ("model.embed_tokens.weight", 0),
    ("model.layers.0.mlp.gate_proj.weight", 0),
    ("model.layers.2.self_attn.q_proj.weight", 0),
    ("model.layers.3.mlp.experts.down_proj", 1),
    ("model.layers.10.input_layernorm.weight", 2),
    ("model.norm.weight", 2),
    ("lm_head.weight", 2),
]


@pytest.mark.parametrize(("name", "stage"), NAMES)
def test_every_tensor_has_its_stage(name, stage):
    assert PipelineLayout((0, 3, 5, 11), data_parallel_size=2).stage_of(name) == stage


def test_ranks_are_numbered_stage_by_stage():
    layout = PipelineLayout((0, 3, 5, 11), data_parallel_size=4)
    assert [layout.first_rank(stage) for stage in range(layout.num_stages)] == [0, 4, 8]
    assert [list(layout.layers(stage)) for stage in (0, 1)] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 7])
def test_no_stage_is_empty_and_no_layer_left_out(num_stages, partition):
    layout = plan_pipeline(small_config(num_hidden_layers=7), num_stages, 2 * num_stages, partition)
    assert [layer for stage in range(num_stages) for layer in layout.layers(stage)] == list(range(7))
    assert all(len(layout.layers(stage)) > 0 for stage in range(num_stages))
    assert layout.data_parallel_size == 2


def test_parameters_decide_not_layers():
    """The first half has no experts, so that it takes more layers to weigh as much."""
    config = small_config(num_hidden_layers=8, decoder_sparse_step=1, moe_layer_indices=[5, 6, 7], num_experts=8)
    assert plan_pipeline(config, 2, 2, "uniform").bounds == (0, 4, 8)
    assert plan_pipeline(config, 2, 2).bounds[1] > 5


def test_embeddings_and_head_weigh_too():
    plain = small_config(num_hidden_layers=8, decoder_sparse_step=1)
    wide = small_config(num_hidden_layers=8, decoder_sparse_step=1, vocab_size=4096)
    inner = [len(plan_pipeline(config, 4, 4).layers(1)) for config in (plain, wide)]
    assert inner[1] > inner[0], "the ends have less room for layers"
