"""Which configuration an upcycled model has, and what is refused before anything is read."""

import pytest
from small import small_config

from moe_hf import MoEConfig
from moe_hf.checkpoint.upcycling import Copy, Drop, Granular, UpcyclingRecipe, upcycled_config
from moe_hf.checkpoint.upcycling.recipe import parse_layers
from moe_hf.errors import ConfigError


def dense_config(**changes) -> MoEConfig:
    values = {
        "num_experts": 0,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 0,
        "shared_expert_gate": False,
    }
    return small_config(**(values | changes))


@pytest.mark.parametrize(
    ("text", "sparse"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("every-1", [0, 1, 2, 3, 4, 5]),
        ("every-2", [1, 3, 5]),
        ("every-4", [3]),
        ("every-6", [5]),
        ("0", [0]),
        ("5,0,2", [0, 2, 5]),
    ],
)
def test_layers(text, sparse):
    types = parse_layers(text, 6)
    assert len(types) == 6 and set(types) <= {"dense", "sparse"}
    assert [i for i, kind in enumerate(types) if kind == "sparse"] == sparse


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_nth_layer_means_what_decoder_sparse_step_means(step):
    config = small_config(decoder_sparse_step=step, num_hidden_layers=7)
    assert parse_layers(f"every-{step}", 7) == config.mlp_layer_types


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("every-0", "--layers every-0: the step must be between 1 and the model's 4 layers."),
        ("every-5", "--layers every-5: the step must be between 1 and the model's 4 layers."),
        ("every-x", "--layers 'every-x' must be 'all', 'every-N' or indices as in '1,3,5'."),
        ("", "--layers '' must be 'all', 'every-N' or indices as in '1,3,5'."),
        ("-1", "--layers '-1' must be 'all', 'every-N' or indices as in '1,3,5'."),
        ("1,,2", "--layers '1,,2' must be 'all', 'every-N' or indices as in '1,3,5'."),
        ("0,4", "--layers 0,4 must be different layers between 0 and 3."),
        ("2,2", "--layers 2,2 must be different layers between 0 and 3."),
    ],
)
def test_layers_that_are_not_there_are_refused(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_layers(text, 4)
    assert str(error.value) == sentence


def test_only_what_makes_the_experts_changes():
    dense = dense_config(
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
        router_balancing="loss_free",
        eos_token_id=[1, 3],
    )
    config = upcycled_config(dense, UpcyclingRecipe(Granular(3), 12, 6, "every-2"))
    changed = {name: getattr(config, name) for name in MoEConfig.__annotations__}
    for name, value in {
        "num_experts": 12,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 16,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    }.items():
        assert changed.pop(name) == value
    assert changed == {name: getattr(dense, name) for name in changed}
    # No part of the one is a part of the other.
    config.rope_parameters["factor"] = 3.0
    assert dense.rope_parameters["factor"] == 2.0


def test_routing_is_plain_whatever_the_dense_model_said():
    dense = dense_config(
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        n_group=7,
        topk_group=3,
        shared_expert_gate=True,
    )
    config = upcycled_config(dense, UpcyclingRecipe(Copy(), 8, 2))
    assert config.norm_topk_prob and config.routed_scaling_factor == 1.0 and config.scoring_func == "softmax"
    assert (config.n_group, config.topk_group, config.shared_expert_gate) == (1, 1, False)
    assert config.moe_intermediate_size == dense.intermediate_size


def test_shorthands_for_the_layers_do_not_contradict_the_choice():
    dense = dense_config(decoder_sparse_step=2, first_k_dense_replace=1)
    config = upcycled_config(dense, UpcyclingRecipe(Copy(), 4, 2, layers="0,3"))
    assert config.mlp_layer_types == ["sparse", "dense", "dense", "sparse"]
    assert MoEConfig.from_dict(config.to_dict()).mlp_layer_types == config.mlp_layer_types


@pytest.mark.parametrize(
    ("dense", "recipe", "sentence"),
    [
        (
            {"num_experts": 4, "decoder_sparse_step": 2},
            UpcyclingRecipe(Copy(), 8, 2),
            "The model already has 4 experts in 2 layers; upcycling starts from a dense one.",
        ),
        ({}, UpcyclingRecipe(Copy(), 1, 1), "--num-experts 1 must be at least 2."),
        ({}, UpcyclingRecipe(Copy(), 0, 0), "--num-experts 0 must be at least 2."),
        ({}, UpcyclingRecipe(Copy(), 4, 0), "--num-experts-per-tok 0 must be between 1 and --num-experts 4."),
        ({}, UpcyclingRecipe(Copy(), 4, 5), "--num-experts-per-tok 5 must be between 1 and --num-experts 4."),
        ({}, UpcyclingRecipe(Granular(3), 8, 3), "--num-experts 8 must be a multiple of --granularity 3."),
        ({}, UpcyclingRecipe(Drop(0.001), 8, 3), "--drop-ratio 0.001 of the model's"),
        ({}, UpcyclingRecipe(Copy(), 4, 2, "4"), "--layers 4 must be different layers between 0 and 3."),
        (
            {"initializer_range": 0.0},
            UpcyclingRecipe(Copy(), 4, 2),
            "A router with the standard deviation 0.0 of the model's initializer_range could not tell experts apart; "
            "give --router-std of at least 0.0001, usually 0.02.",
        ),
        (
            {},
            UpcyclingRecipe(Copy(), 4, 2, router_std=float("nan")),
            "A router with the standard deviation nan of --router-std could not tell experts apart; "
            "give --router-std of at least 0.0001, usually 0.02.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(dense, recipe, sentence):
    with pytest.raises(ConfigError) as error:
        upcycled_config(dense_config(**dense), recipe)
    assert str(error.value).startswith(sentence)


def test_a_router_may_have_a_deviation_of_its_own():
    config = upcycled_config(dense_config(initializer_range=0.0), UpcyclingRecipe(Copy(), 4, 2, router_std=0.02))
    assert config.num_experts == 4
