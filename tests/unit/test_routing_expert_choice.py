"""Expert choice (Zhou et al. 2022, arXiv 2202.09368, section 3.2), alone and in a whole block, against loops."""

import math

import pytest
import torch
from helpers_model import assert_close
from routing_reference import HIDDEN_SIZE, expert_choice, random, randomize, routing_config, sparse_block

from moe_hf.modeling_moe import MoESparseBlock
from moe_hf.routing import ExpertChoiceRouter

CONFIGS = [
    {},
    {"expert_capacity_factor": 1.0, "num_experts_per_tok": 1},
    {"expert_capacity_factor": 0.5},
    {"expert_capacity_factor": 2.0, "routed_scaling_factor": 2.5},
    {"expert_capacity_factor": 0.015625},
    {"expert_capacity_factor": 50.0},
    {"num_experts_per_tok": 6},
    {"scoring_func": "sigmoid"},
    {"scoring_func": "sigmoid", "num_experts": 1, "num_experts_per_tok": 1, "expert_capacity_factor": 0.25},
]
CAPACITIES = [8, 4, 4, 16, 1, 23, 23, 8, 6]


def choosing_config(**changes):
    return routing_config(**{"router_balancing": "expert_choice"} | changes)


def taken_by(weights: torch.Tensor, token_index: torch.Tensor) -> list[dict[int, float]]:
    """Return, for every expert, its tokens and their weights."""
    assert weights.dtype == torch.float32 and token_index.dtype == torch.int64
    taken = [dict(zip(*pair, strict=True)) for pair in zip(token_index.tolist(), weights.tolist(), strict=True)]
    assert all(len(tokens) == token_index.shape[1] for tokens in taken), "an expert took a token twice"
    return taken


def test_the_reference_itself_on_paper():
    scores = [[0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]
    logits = torch.tensor([[math.log(x) for x in row] for row in scores], dtype=torch.float64)
    config = choosing_config(num_experts=2, num_experts_per_tok=1, routed_scaling_factor=10.0)
    # Two tokens each: token 3 has the third best score at both experts and goes to none.
    first, second = expert_choice(logits, config)
    assert list(first) == [2, 0] and [w.item() for w in first.values()] == pytest.approx([9.0, 6.0])
    assert list(second) == [1, 3] and [w.item() for w in second.values()] == pytest.approx([8.0, 5.0])
    # ceil(0.75 * 4 * 1 / 2) = 2 too; at half of it they take one token, and never none.
    for factor, capacity in [(0.75, 2), (0.5, 1), (0.125, 1), (1.25, 3), (9.0, 4)]:
        config = choosing_config(num_experts=2, num_experts_per_tok=1, expert_capacity_factor=factor)
        assert [len(tokens) for tokens in expert_choice(logits, config)] == [capacity] * 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes, capacity", list(zip(CONFIGS, CAPACITIES, strict=True)), ids=str)
def test_router_equals_the_loop(changes, capacity, training):
    config = choosing_config(**changes)
    router = randomize(ExpertChoiceRouter(config)).train(training)
    tokens = random(23, HIDDEN_SIZE, seed=1).requires_grad_()
    weights, token_index = router(tokens)
    assert weights.shape == token_index.shape == (config.num_experts, capacity)

    exact = [tensor.detach().double().requires_grad_() for tensor in (tokens, router.weight)]
    expected = expert_choice(exact[0] @ exact[1].T, config)
    for tokens_of, expected_of in zip(taken_by(weights, token_index), expected, strict=True):
        assert tokens_of.keys() == expected_of.keys()
        assert tokens_of == pytest.approx({token: w.item() for token, w in expected_of.items()}, rel=1e-5)

    # Each assignment has a factor of its own, whatever the order in which an expert lists its tokens.
    factors = random(config.num_experts, 23, seed=3)
    gradients = torch.autograd.grad((weights * factors.gather(1, token_index)).sum(), (tokens, router.weight))
    pairs = [w * factors[e, t] for e, tokens_of in enumerate(expected) for t, w in tokens_of.items()]
    for gradient, wanted in zip(gradients, torch.autograd.grad(sum(pairs), exact), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    router = randomize(ExpertChoiceRouter(choosing_config()))
    weights, token_index = router(random(num_tokens, HIDDEN_SIZE, seed=1))
    assert weights.shape == token_index.shape == (6, num_tokens)
    assert token_index.tolist() == [[0] * num_tokens] * 6
    assert weights.sum().item() == pytest.approx(num_tokens)


def test_equal_logits_choose_different_tokens_of_equal_weight():
    router = ExpertChoiceRouter(choosing_config())
    torch.nn.init.zeros_(router.weight)
    for tokens_of in taken_by(*router(random(12, HIDDEN_SIZE, seed=1))):
        assert list(tokens_of.values()) == pytest.approx([1 / 6] * 4)


def test_router_computes_in_float32_whatever_it_is_given():
    config = choosing_config()
    router = randomize(ExpertChoiceRouter(config)).bfloat16()
    tokens = random(23, HIDDEN_SIZE, seed=1).bfloat16()
    taken = taken_by(*router(tokens))
    expected = expert_choice(tokens.double() @ router.weight.detach().double().T, config)
    for tokens_of, expected_of in zip(taken, expected, strict=True):
        assert tokens_of == pytest.approx({token: w.item() for token, w in expected_of.items()}, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# The block

SHARED = [
    {},
    {"shared_expert_intermediate_size": 5},
    {"shared_expert_intermediate_size": 5, "shared_expert_gate": True},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [{}, {"expert_capacity_factor": 0.5, "routed_scaling_factor": 2.5}], ids=str)
@pytest.mark.parametrize("shared", SHARED, ids=str)
def test_block_and_its_gradients_equal_the_loop(shared, changes, training):
    config = choosing_config(**shared | changes)
    block = randomize(MoESparseBlock(config)).train(training)
    hidden_states = random(2, 9, HIDDEN_SIZE, seed=1).requires_grad_()
    output = block(hidden_states)
    assert output.shape == (2, 9, HIDDEN_SIZE)

    parameters = {name: value.detach().double().requires_grad_() for name, value in block.named_parameters()}
    exact = hidden_states.detach().double().requires_grad_()
    # The experts choose among the tokens of the whole batch.
    expected = sparse_block(parameters, exact.flatten(0, 1), config, training).reshape(2, 9, HIDDEN_SIZE)
    assert_close(output, expected)
    taken = expert_choice((exact.flatten(0, 1) @ parameters["gate.weight"].T).detach(), config)
    times = [sum(token in tokens_of for tokens_of in taken) for token in range(18)]
    assert len(set(times)) > 2 and (config.expert_capacity_factor is None or min(times) == 0)

    factors = random(*output.shape, seed=3)
    gradients = torch.autograd.grad((output * factors).sum(), (hidden_states, *block.parameters()))
    wanted = torch.autograd.grad((expected * factors).sum(), (exact, *parameters.values()))
    for name, gradient, exact_gradient in zip(("hidden_states", *parameters), gradients, wanted, strict=True):
        assert_close(gradient, exact_gradient, name=name)


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (1, 0)])
def test_block_of_few_tokens(shape):
    config = choosing_config()
    block, hidden_states = randomize(MoESparseBlock(config)), random(*shape, HIDDEN_SIZE, seed=1)
    output = block(hidden_states)
    assert output.shape == hidden_states.shape
    if output.numel():
        exact = {name: value.detach().double() for name, value in block.state_dict().items()}
        assert_close(output[0], sparse_block(exact, hidden_states[0].double(), config, training=True))
