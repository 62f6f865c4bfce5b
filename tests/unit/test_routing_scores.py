"""Weights of the chosen experts, with the top-k before and after the softmax, against loops from the formulas."""

import math

import pytest
import torch
from routing_reference import HIDDEN_SIZE, check_router, random, randomize, route, routing_config

from moe_hf.routing import MoERouter

CONFIGS = [
    {},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"topk_before_softmax": True},
    {"topk_before_softmax": True, "routed_scaling_factor": 2.5},
    {"topk_before_softmax": True, "num_experts_per_tok": 3},
    {"topk_before_softmax": True, "num_experts_per_tok": 6},
    {"topk_before_softmax": True, "n_group": 3, "topk_group": 2, "group_scoring_func": "max"},
    {"topk_before_softmax": True, "n_group": 3, "topk_group": 2, "group_scoring_func": "top2_sum"},
    {"scoring_func": "sigmoid"},
    {"scoring_func": "sigmoid", "norm_topk_prob": False, "routed_scaling_factor": 0.5},
    {"scoring_func": "sigmoid", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    {"scoring_func": "softmax", "n_group": 3, "topk_group": 1, "group_scoring_func": "max", "norm_topk_prob": False},
]


def test_the_reference_itself_on_paper():
    logits = torch.tensor([[0.0, math.log(3), math.log(4)]], dtype=torch.float64)
    small = {"num_experts": 3, "num_experts_per_tok": 2}
    for changes, weights in [
        ({"norm_topk_prob": False}, [4 / 8, 3 / 8]),
        ({"norm_topk_prob": True}, [4 / 7, 3 / 7]),
        ({"topk_before_softmax": True}, [4 / 7, 3 / 7]),
        ({"scoring_func": "sigmoid", "norm_topk_prob": False}, [4 / 5, 3 / 4]),
        ({"scoring_func": "sigmoid", "routed_scaling_factor": 31.0}, [16.0, 15.0]),
    ]:
        routes = route(logits, routing_config(**small | changes))
        assert routes.index == [[2, 1]] and routes.tokens_per_expert == [0, 1, 1]
        assert routes.weights.tolist() == [pytest.approx(weights)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_router_equals_the_loop(changes, training):
    config = routing_config(**changes)
    router = randomize(MoERouter(config)).train(training)
    check_router(router, config, random(40, HIDDEN_SIZE, seed=1))


@pytest.mark.parametrize("changes", [{}, {"topk_before_softmax": True}, {"n_group": 3, "topk_group": 2}], ids=str)
def test_a_bias_is_added_to_the_scores(changes):
    """arXiv 2408.15664, equation 3: to the gate's scores, whichever way these become weights, and not to the logits."""
    config = routing_config(router_balancing="loss_free", **changes)
    router, bias = randomize(MoERouter(config)), [0.5, -0.25, 0.125, 0.0, -0.5, 0.25]
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    biased = check_router(router, config, random(40, HIDDEN_SIZE, seed=1), bias)
    router.e_score_correction_bias.zero_()
    assert check_router(router, config, random(40, HIDDEN_SIZE, seed=1)).index != biased.index


def test_both_orders_of_softmax_and_top_k_give_the_same_weights():
    """In the formula exactly so: the sum over all experts cancels."""
    outputs = []
    for before in (True, False):
        router = randomize(MoERouter(routing_config(topk_before_softmax=before)))
        outputs.append(router(random(40, HIDDEN_SIZE, seed=1)))
    assert torch.equal(outputs[0][1], outputs[1][1])
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-5, atol=0.0)


def test_top_k_first_survives_a_second_expert_that_is_far_behind():
    config = routing_config(topk_before_softmax=True)
    router = MoERouter(config)
    with torch.no_grad():
        router.weight.copy_(-50.0 * torch.arange(6)[:, None].expand(6, HIDDEN_SIZE))
    weights, index, _ = router(torch.ones(3, HIDDEN_SIZE))
    weights.sum().backward()
    assert index.tolist() == [[0, 1]] * 3
    assert weights.tolist() == [pytest.approx([1.0, 0.0])] * 3
    assert torch.isfinite(router.weight.grad).all()


@pytest.mark.parametrize("changes", [{}, {"topk_before_softmax": True}, {"scoring_func": "sigmoid"}], ids=str)
def test_equal_logits_share_the_weight(changes):
    router = MoERouter(routing_config(**changes))
    torch.nn.init.zeros_(router.weight)
    weights, index, counts = router(random(9, HIDDEN_SIZE, seed=1))
    assert all(len(set(experts)) == 2 and set(experts) <= set(range(6)) for experts in index.tolist())
    assert weights.tolist() == [pytest.approx([0.5, 0.5])] * 9
    assert counts.tolist() == [index.flatten().tolist().count(expert) for expert in range(6)]


@pytest.mark.parametrize("changes", [{}, {"topk_before_softmax": True}, {"scoring_func": "sigmoid"}], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(changes, num_tokens):
    config = routing_config(**changes)
    router = randomize(MoERouter(config)).train()
    tokens = random(num_tokens, HIDDEN_SIZE, seed=1)
    weights, index, counts = router(tokens)
    assert weights.shape == index.shape == (num_tokens, 2)
    assert counts.shape == (6,) and counts.sum() == 2 * num_tokens
    if num_tokens:
        check_router(router, config, tokens)
