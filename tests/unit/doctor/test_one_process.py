"""The doctor's reference is the tests' own: formulas written out, sharing nothing but the forward pass."""

from dataclasses import replace

import oracle
import pytest
import small
import torch
from small import GLOBAL_MICRO_BATCH, make_rows, save_small_model, small_config

from moe_hf import MoEForCausalLM
from moe_hf.doctor.one_process import Recipe, routes_by_rank, train_in_one_process

DENSE = {"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False}


@pytest.mark.parametrize(
    ("changes", "accumulation", "pieces"),
    [
        ({}, 1, 1),
        ({}, 2, 1),
        ({"router_aux_loss_scope": "local"}, 2, 2),
        ({"scoring_func": "sigmoid", "router_balancing": "loss_free", "router_bias_update_speed": 0.02}, 2, 1),
    ],
    ids=["softmax", "accumulated", "local", "loss_free"],
)
def test_it_takes_the_oracles_steps(changes, accumulation, pieces, tmp_path):
    save_small_model(tmp_path, **changes)
    rows = make_rows(3 * accumulation * GLOBAL_MICRO_BATCH)
    given = replace(small.recipe(rows, accumulation), num_steps=3)
    if "router_bias_update_speed" in changes:
        given = replace(given, aux_coef=0.0, bias_update_speed=changes["router_bias_update_speed"])
    expected = oracle.train(MoEForCausalLM.from_pretrained(tmp_path).train(), given, pieces=pieces)
    recipe = Recipe(num_steps=3, micro_batches_per_step=accumulation, data_ranks=2, rows_per_rank=2)
    assert recipe.num_rows == len(rows)
    result = train_in_one_process(MoEForCausalLM.from_pretrained(tmp_path), rows, recipe)
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    assert result.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6)
    assert any(norm > recipe.max_grad_norm for norm in result.grad_norms)  # so that clipping is part of it
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(result.weights[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "by_rank"),
    [
        ({}, False),
        ({"router_aux_loss_scope": "sequence"}, False),
        ({"router_balancing": "sinkhorn"}, True),
        ({"expert_capacity_factor": 1.0}, True),
        (DENSE | {"router_aux_loss_scope": "local"}, False),
    ],
)
def test_which_routing_looks_at_one_ranks_tokens(changes, by_rank):
    assert routes_by_rank(small_config(**changes)) == by_rank
