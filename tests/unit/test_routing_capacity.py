"""Expert capacity and the two ways to drop tokens (GShard, arXiv 2006.16668, algorithm 1) against a queue in a loop."""

import pytest
import torch
from routing_reference import (
    HIDDEN_SIZE,
    check_router,
    dropped_slots,
    random,
    randomize,
    route,
    routing_config,
    sparse_block,
)

from moe_hf.modeling_moe import MoESparseBlock
from moe_hf.router_selection import drop_beyond_capacity, expert_capacity
from moe_hf.routing import MoERouter

POLICIES = ["position", "probability"]


def test_the_reference_itself_on_paper():
    index = [[0, 1], [0, 2], [1, 0], [0, 1]]
    weights = [[0.5, 0.4], [0.9, 0.1], [0.6, 0.3], [0.8, 0.2]]
    # In turn: expert 0 gets tokens 0, 1, 3, and then token 2's second choice; expert 1 tokens 2, 0, 3.
    by_position = [[False, False], [False, False], [False, True], [True, True]]
    assert dropped_slots(weights, index, 3, 2, "position") == by_position
    # By weight: expert 0 gets 0.9, 0.8, 0.5, 0.3; expert 1 0.6, 0.4, 0.2.
    by_weight = [[True, False], [False, False], [False, True], [False, True]]
    assert dropped_slots(weights, index, 3, 2, "probability") == by_weight
    # Equal weights stand in the order of positions.
    assert dropped_slots([[0.5, 0.5]] * 4, index, 3, 2, "probability") == by_position
    assert dropped_slots(weights, index, 3, 4, "position") == [[False, False]] * 4
    assert dropped_slots(weights, index, 3, 0, "probability") == [[True, True]] * 4


def test_the_reference_counts_the_capacity_up():
    logits = torch.zeros(7, 6, dtype=torch.float64)
    logits[:, 2], logits[:, 3] = 2.0, 1.0
    # 1.25 * 7 * 2 / 6 = 2.9, so experts 2 and 3 keep three of seven tokens.
    routes = route(logits, routing_config(expert_capacity_factor=1.25), training=True)
    assert routes.dropped == [[False, False]] * 3 + [[True, True]] * 4
    assert routes.tokens_per_expert == [0, 0, 7, 7, 0, 0]
    assert (routes.weights[3:] == 0).all() and (routes.weights[:3].sum(1) - 1).abs().max() < 1e-12
    assert route(logits, routing_config(expert_capacity_factor=1.25)).dropped == [[False, False]] * 7


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 3, 8, 11, 40, 1000])
@pytest.mark.parametrize("num_experts, top_k", [(6, 1), (6, 2), (6, 6), (1, 1), (16, 3)])
def test_dropped_slots_equal_the_loop(num_experts, top_k, capacity, policy):
    weights, index = random(40, num_experts, seed=num_experts + top_k).softmax(-1).topk(top_k)
    dropped = drop_beyond_capacity(weights, index, num_experts, capacity, policy)
    assert dropped.dtype == torch.bool
    assert dropped.tolist() == dropped_slots(weights.tolist(), index.tolist(), num_experts, capacity, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_in_any_order_equal_the_loop(policy):
    """The second choice may weigh more than the first: sinkhorn and biases choose by something else."""
    index = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(t))[:3] for t in range(30)])
    weights = random(30, 3, seed=7).sigmoid()
    dropped = drop_beyond_capacity(weights, index, 5, 9, policy)
    assert dropped.tolist() == dropped_slots(weights.tolist(), index.tolist(), 5, 9, policy)


def test_equal_weights_are_dropped_by_position():
    """Many ties: a sort that is not stable would show."""
    weights, index = torch.full((300, 2), 0.5), torch.tensor([[0, 1], [1, 0], [0, 2]]).repeat(100, 1)
    expected = dropped_slots(weights.tolist(), index.tolist(), 3, 90, "position")
    for policy in POLICIES:
        assert drop_beyond_capacity(weights, index, 3, 90, policy).tolist() == expected
    weights[:, 0] = 0.75
    expected = dropped_slots(weights.tolist(), index.tolist(), 3, 150, "probability")
    assert drop_beyond_capacity(weights, index, 3, 150, "probability").tolist() == expected


CONFIGS = [
    {},
    {"expert_capacity_factor": 0.5},
    {"expert_capacity_factor": 1.25, "num_experts_per_tok": 3},
    {"expert_capacity_factor": 100.0},
    {"expert_capacity_factor": 0.5, "num_experts_per_tok": 6},
    {"num_experts_per_tok": 1},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"topk_before_softmax": True},
    {"scoring_func": "sigmoid", "norm_topk_prob": False},
    {"scoring_func": "sigmoid", "n_group": 3, "topk_group": 2},
    {"num_experts": 1, "num_experts_per_tok": 1, "expert_capacity_factor": 0.25},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_router_equals_the_loop(changes, policy):
    config = routing_config(**{"expert_capacity_factor": 1.0, "token_drop_policy": policy} | changes)
    router, tokens = randomize(MoERouter(config)), random(40, HIDDEN_SIZE, seed=1)
    training = check_router(router.train(), config, tokens)
    some = config.expert_capacity_factor != 100.0 and config.num_experts_per_tok < 6
    assert any(map(any, training.dropped)) == (some or config.expert_capacity_factor == 0.5)
    # Evaluation drops nothing, and only the weights differ.
    evaluation = check_router(router.eval(), config, tokens)
    assert not any(map(any, evaluation.dropped)) and evaluation.index == training.index


@pytest.mark.parametrize("policy", POLICIES)
def test_a_bias_decides_the_choice_and_not_who_is_dropped(policy):
    config = routing_config(
        router_balancing="loss_free", scoring_func="sigmoid", expert_capacity_factor=1.0, token_drop_policy=policy
    )
    router, bias = randomize(MoERouter(config)).train(), [3.0, 0.0, 2.0, -1.0, 0.0, 0.0]
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    routes = check_router(router, config, random(40, HIDDEN_SIZE, seed=1), bias)
    assert routes.tokens_per_expert[0] == 40 and any(map(any, routes.dropped))


def test_the_policies_differ():
    tokens, choices = random(40, HIDDEN_SIZE, seed=1), []
    for policy in POLICIES:
        config = routing_config(expert_capacity_factor=0.5, token_drop_policy=policy)
        weights, _, counts = randomize(MoERouter(config)).train()(tokens)
        choices.append(weights == 0)
        assert counts.sum() == 80
        # The best weights are kept as they are: what is left of a token does not sum to 1.
        assert ((weights.sum(1) > 0) & (weights.sum(1) < 0.99)).any()
    assert not torch.equal(*choices)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(num_tokens, policy):
    config = routing_config(expert_capacity_factor=0.5, token_drop_policy=policy)
    router, tokens = randomize(MoERouter(config)).train(), random(num_tokens, HIDDEN_SIZE, seed=1)
    weights, index, counts = router(tokens)
    assert weights.shape == index.shape == (num_tokens, 2) and counts.sum() == 2 * num_tokens
    if num_tokens:
        check_router(router, config, tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_tokens_to_one_expert(policy):
    config = routing_config(expert_capacity_factor=1.0, token_drop_policy=policy, num_experts_per_tok=1)
    router = MoERouter(config).train()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[3] = 1.0
    weights, index, counts = router(torch.ones(9, HIDDEN_SIZE))
    assert index.tolist() == [[3]] * 9 and counts.tolist() == [0, 0, 0, 9, 0, 0]
    # ceil(1.0 * 9 * 1 / 6) = 2, and equal tokens stand in their order.
    assert weights.tolist() == [[1.0]] * 2 + [[0.0]] * 7


@pytest.mark.parametrize("policy", POLICIES)
def test_a_dropped_slot_adds_nothing_to_the_block(policy):
    config = routing_config(expert_capacity_factor=0.5, token_drop_policy=policy, shared_expert_intermediate_size=4)
    block, tokens = randomize(MoESparseBlock(config)), random(2, 9, HIDDEN_SIZE, seed=1)
    exact = {name: value.detach().double() for name, value in block.state_dict().items()}
    outputs = []
    for training in (True, False):
        outputs.append(block.train(training)(tokens).detach())
        expected = sparse_block(exact, tokens.double().flatten(0, 1), config, training)
        torch.testing.assert_close(outputs[-1].double().flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_a_share_that_is_whole_is_not_rounded_up():
    """1.1 * 10 is 11.000000000000002 in floating point."""
    assert expert_capacity(num_tokens=40, num_experts=4, top_k=1, capacity_factor=1.1) == 11
    assert expert_capacity(num_tokens=41, num_experts=4, top_k=1, capacity_factor=1.1) == 12
