"""Sinkhorn balancing (Clark et al. 2022, arXiv 2202.01169; Cuturi 2013, arXiv 1306.0895) against a slow scaling."""

import math

import pytest
import torch
from routing_reference import HIDDEN_SIZE, check_router, random, randomize, routing_config, sinkhorn_plan

from moe_hf.router_selection import sinkhorn
from moe_hf.routing import MoERouter

SHAPES = [(30, 6), (7, 3), (5, 8), (1, 4), (6, 1), (4, 4)]
CONVERGED = {"router_balancing": "sinkhorn", "sinkhorn_iterations": 300}


def marginal_error(plan: torch.Tensor) -> float:
    """Return the largest deviation of a row's sum from 1 or of a column's from T / E, as a share of it."""
    share = plan.shape[0] / plan.shape[1]
    return max((plan.sum(1) - 1).abs().max().item(), (plan.sum(0) / share - 1).abs().max().item())


def test_the_reference_itself_on_paper():
    # The plan of [[a, b], [c, d]] is [[p, 1 - p], [1 - p, p]] with p / (1 - p) = sqrt(a d / (b c)).
    plan = sinkhorn_plan(torch.tensor([[math.log(4), 0.0], [0.0, 0.0]]))
    assert plan.tolist() == [pytest.approx([2 / 3, 1 / 3]), pytest.approx([1 / 3, 2 / 3])]
    # Rows that differ by a factor only are all the same to it, and so are columns.
    same = torch.tensor([3.0, -1.0])[:, None] + torch.tensor([0.0, 2.0, 5.0])
    assert sinkhorn_plan(same).flatten().tolist() == pytest.approx([1 / 3] * 6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plan_equals_the_slow_scaling(shape):
    logits = 2 * random(*shape, seed=0)
    plan = sinkhorn(logits, 300)
    assert plan.shape == shape and marginal_error(plan) < 1e-3
    torch.testing.assert_close(plan.double(), sinkhorn_plan(logits), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_iterations", [1, 2, 8])
def test_an_iteration_normalises_the_columns_and_then_the_rows(num_iterations):
    logits = 2 * random(9, 5, seed=1)
    rows = [[math.exp(x) for x in row] for row in logits.tolist()]
    for _ in range(num_iterations):
        totals = [sum(column) for column in zip(*rows, strict=True)]
        rows = [[x / total for x, total in zip(row, totals, strict=True)] for row in rows]
        rows = [[x / sum(row) for x in row] for row in rows]
    torch.testing.assert_close(sinkhorn(logits, num_iterations), torch.tensor(rows), rtol=1e-4, atol=1e-7)


def test_every_iteration_comes_closer():
    logits = 3 * random(40, 6, seed=2)
    errors = [marginal_error(sinkhorn(logits, n)) for n in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 > 0.02 > errors[-1]


def test_plan_of_large_logits_does_not_overflow():
    logits = 2 * random(12, 4, seed=3)
    shifted = logits + 1000 * random(12, 1, seed=4) + 1000 * random(1, 4, seed=5)
    assert shifted.max() > 1000 and shifted.min() < -1000
    # What is added to a row or to a column changes nothing; at 2000, float32 has steps of 1e-4.
    torch.testing.assert_close(sinkhorn(shifted, 300).double(), sinkhorn_plan(logits), rtol=5e-3, atol=1e-5)
    plan = sinkhorn(200 * random(12, 4, seed=6), 8)
    assert torch.isfinite(plan).all() and (plan >= 0).all() and (plan.sum(1) > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 6},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"scoring_func": "sigmoid"},
        {"topk_before_softmax": True},
        {"n_group": 3, "topk_group": 2},
        {"n_group": 2, "topk_group": 1, "group_scoring_func": "max", "scoring_func": "sigmoid"},
        {"expert_capacity_factor": 1.0},
        {"expert_capacity_factor": 0.75, "token_drop_policy": "probability", "norm_topk_prob": False},
    ],
    ids=str,
)
def test_router_equals_the_loop(changes):
    config = routing_config(**CONVERGED | changes)
    router, tokens = randomize(MoERouter(config)), random(40, HIDDEN_SIZE, seed=1)
    training = check_router(router.train(), config, tokens)
    evaluation = check_router(router.eval(), config, tokens)
    assert training.index != evaluation.index


def test_choice_follows_the_plan_of_as_many_iterations_as_configured():
    choices = []
    for num_iterations in (1, 3, 8):
        config = routing_config(**CONVERGED | {"sinkhorn_iterations": num_iterations})
        router, tokens = randomize(MoERouter(config)).train(), 2 * random(60, HIDDEN_SIZE, seed=1)
        _, index, _ = router(tokens)
        plan = sinkhorn((tokens @ router.weight.T).detach(), num_iterations)
        assert index.tolist() == plan.topk(2).indices.tolist()
        choices.append(index.tolist())
    assert choices[0] != choices[1] != choices[2]


def test_a_collapsed_router_is_balanced_while_training():
    config = routing_config(**CONVERGED | {"num_experts_per_tok": 1})
    router, tokens = randomize(MoERouter(config)), random(60, HIDDEN_SIZE, seed=1)
    with torch.no_grad():
        tokens[:, 0], router.weight[:, 0] = 1.0, 0.0
        router.weight[4, 0] = 30.0
    counts = router.eval()(tokens)[2]
    assert counts.tolist() == [0, 0, 0, 0, 60, 0]
    counts = router.train()(tokens)[2]
    # The plan gives each expert ten tokens' worth; the best expert of each row need not split as evenly.
    assert counts.min() >= 4 and counts.max() <= 17


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    config = routing_config(**CONVERGED)
    router = randomize(MoERouter(config)).train()
    weights, index, counts = router(random(num_tokens, HIDDEN_SIZE, seed=1))
    assert weights.shape == index.shape == (num_tokens, 2) and counts.sum() == 2 * num_tokens
    assert torch.isfinite(weights).all() and sinkhorn(torch.zeros(0, 6), 8).shape == (0, 6)
    # One token's plan is even whatever its logits, so any two experts may be chosen, but no one twice.
    assert all(len(set(experts)) == 2 for experts in index.tolist())


def test_equal_logits_cost_nothing_but_the_tie():
    config = routing_config(**CONVERGED)
    router = MoERouter(config).train()
    torch.nn.init.zeros_(router.weight)
    weights, index, _ = router(random(12, HIDDEN_SIZE, seed=1))
    assert weights.tolist() == [pytest.approx([0.5, 0.5])] * 12
    assert all(len(set(experts)) == 2 for experts in index.tolist())
    torch.testing.assert_close(sinkhorn(torch.zeros(12, 6), 8), torch.full((12, 6), 1 / 6))
