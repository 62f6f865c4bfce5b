"""Noise on the router's input (Switch Transformer, arXiv 2101.03961, section 2.2)."""

import pytest
import torch
from routing_reference import HIDDEN_SIZE, random, randomize, routing_config, sparse_block

from moe_hf.modeling_moe import MoESparseBlock
from moe_hf.routing import ExpertChoiceRouter, MoERouter

EPS = 0.1


def seeing_router(eps: float) -> MoERouter:
    """Return a router, in training, whose logits are its input: its weight is the unit matrix."""
    router = MoERouter(routing_config(num_experts=HIDDEN_SIZE, router_jitter_noise=eps)).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(HIDDEN_SIZE))
    return router


def logits_of(router: MoERouter, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = router.tap.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    router(tokens)
    handle.remove()
    return seen[0]


def positive_tokens(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (1 + random(num_tokens, HIDDEN_SIZE, seed=1).abs()).to(dtype)


def largest_distance_from_uniform(noise: torch.Tensor, eps: float) -> float:
    """Return Kolmogorov's and Smirnov's statistic against the uniform distribution on [1 - eps, 1 + eps]."""
    values = sorted(noise.flatten().tolist())
    expected = [(value - (1 - eps)) / (2 * eps) for value in values]
    n = len(values)
    return max(max(abs(i / n - p), abs((i + 1) / n - p)) for i, p in enumerate(expected))


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.9])
def test_every_element_is_multiplied_by_its_own_uniform_number(eps):
    tokens = positive_tokens(1000)
    noise = logits_of(seeing_router(eps), tokens).detach() / tokens
    assert noise.min() >= 1 - eps - 1e-6 and noise.max() <= 1 + eps + 1e-6
    # 8000 numbers from another distribution, or fewer numbers shared by tokens or elements, are further off.
    assert largest_distance_from_uniform(noise, eps) < 1.63 / 8000**0.5
    for shared in (noise.std(0), noise.std(1)):
        assert shared.mean() == pytest.approx(eps / 3**0.5, rel=0.1)


def test_noise_of_bfloat16_tokens_is_not_rounded_to_their_grid():
    tokens = positive_tokens(500, torch.bfloat16)
    noise = logits_of(seeing_router(0.01), tokens).detach() / tokens.float()
    # Between 0.99 and 1.01 there are five bfloat16 numbers.
    assert len(noise.unique()) > 1000
    assert largest_distance_from_uniform(noise, 0.01) < 1.63 / 4000**0.5


def test_the_same_seed_gives_the_same_noise():
    router, tokens = seeing_router(EPS), positive_tokens(20)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append([logits_of(router, tokens), logits_of(router, tokens)])
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0]) and not torch.equal(drawn[0][0], drawn[0][1])


def test_weights_and_choice_follow_from_the_noisy_logits():
    router, tokens = seeing_router(0.5), positive_tokens(50)
    seen = []
    router.tap.register_forward_pre_hook(lambda module, args: seen.append(args))
    weights, index, _ = router(tokens)
    logits, tapped_index = seen[0][:2]
    assert index.tolist() == logits.topk(2).indices.tolist() == tapped_index.tolist()
    assert index.tolist() != tokens.topk(2).indices.tolist()
    scores = logits.double().softmax(-1).gather(1, index)
    torch.testing.assert_close(weights.double(), scores / scores.sum(1, keepdim=True), rtol=1e-5, atol=0)


def test_gradients_pass_through_the_noise():
    router, tokens = seeing_router(EPS), positive_tokens(20).requires_grad_()
    logits = logits_of(router, tokens)
    noise = (logits / tokens).detach()
    factors = random(*logits.shape, seed=3)
    gradients = torch.autograd.grad((logits * factors).sum(), (tokens, router.weight))
    torch.testing.assert_close(gradients[0], factors * noise)
    torch.testing.assert_close(gradients[1], factors.T @ (tokens * noise).detach())


def test_evaluation_has_no_noise_and_draws_none():
    router, tokens = seeing_router(EPS).eval(), positive_tokens(20)
    before = torch.get_rng_state()
    torch.testing.assert_close(logits_of(router, tokens), tokens, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    # Without noise, training draws none either: runs that do not use it keep their random numbers.
    torch.testing.assert_close(logits_of(seeing_router(0.0), tokens), tokens, rtol=0, atol=0)


def test_experts_see_the_input_without_noise():
    config = routing_config(router_jitter_noise=0.5)
    block, tokens = randomize(MoESparseBlock(config)).train(), random(1, 12, HIDDEN_SIZE, seed=1)
    given = tokens.clone()
    routed = []
    block.gate.register_forward_hook(lambda module, args, outputs: routed.append(outputs))
    output = block(tokens)[0]
    assert torch.equal(tokens, given)
    weights, index, _ = routed[0]
    exact = {name: value.detach().double() for name, value in block.state_dict().items()}
    width = config.moe_intermediate_size
    for token, x in enumerate(tokens[0].double()):
        expected = torch.zeros(HIDDEN_SIZE, dtype=torch.float64)
        for weight, expert in zip(weights[token].double(), index[token].tolist(), strict=True):
            gate_up, down = exact["experts.gate_up_proj"][expert], exact["experts.down_proj"][expert]
            gated = gate_up[:width] @ x
            expected += weight * (down @ (gated * gated.sigmoid() * (gate_up[width:] @ x)))
        torch.testing.assert_close(output[token].double(), expected, rtol=1e-4, atol=1e-4)
    quiet = sparse_block(exact, tokens[0].double(), routing_config(), training=False)
    assert (quiet - output.double()).abs().max() > 0.1


def test_experts_choose_by_noisy_scores_too():
    config = routing_config(
        router_balancing="expert_choice",
        router_jitter_noise=EPS,
        scoring_func="sigmoid",
        num_experts=HIDDEN_SIZE,
        expert_capacity_factor=HIDDEN_SIZE / 2,
    )
    router, tokens = ExpertChoiceRouter(config), positive_tokens(50)
    with torch.no_grad():
        router.weight.copy_(torch.eye(HIDDEN_SIZE))
    for training in (True, False):
        weights, token_index = router.train(training)(tokens)
        # Every expert takes all tokens, and the expert e scores them by their element e.
        noise = weights.detach().logit() / tokens.T.gather(1, token_index)
        assert (noise - 1).abs().max() < (EPS + 1e-4 if training else 1e-4)
        assert (noise - 1).abs().mean() == pytest.approx(EPS / 2 if training else 0.0, rel=0.1, abs=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    weights, index, _ = seeing_router(EPS)(positive_tokens(num_tokens))
    assert weights.shape == index.shape == (num_tokens, 2) and torch.isfinite(weights).all()
