"""The router against per-token loops written from the formulas."""

from types import SimpleNamespace

import pytest
import torch
from helpers_model import reference_route

from moe_hf.routing import MoERouter, count_assignments

HIDDEN_SIZE = 12


def router_config(**changes) -> SimpleNamespace:
    values = {
        "hidden_size": HIDDEN_SIZE,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "group_scoring_func": "top2_sum",
        "router_balancing": "aux_loss",
        "topk_before_softmax": False,
        "router_jitter_noise": 0.0,
        "expert_capacity_factor": None,
    }
    return SimpleNamespace(**(values | changes))


def make_router(
    num_experts: int = 5, top_k: int = 2, normalize: bool = True, scale: float = 1.0, **changes
) -> MoERouter:
    config = router_config(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalize,
        routed_scaling_factor=scale,
        **changes,
    )
    router = MoERouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))
    return router


def make_tokens(num_tokens: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def logits_of(router: MoERouter, tokens: torch.Tensor) -> list[list[float]]:
    return (tokens.detach().double() @ router.weight.detach().double().T).tolist()


def check_route(router: MoERouter, tokens: torch.Tensor, outputs: tuple, bias: list[float] | None = None) -> None:
    top_k_weights, top_k_index, tokens_per_expert = outputs
    counts = [0] * router.num_experts
    for t, logits in enumerate(logits_of(router, tokens)):
        chosen, weights = reference_route(
            logits, router.top_k, router.config.norm_topk_prob, router.config.routed_scaling_factor, bias
        )
        assert top_k_index[t].tolist() == chosen
        assert top_k_weights[t].tolist() == pytest.approx(weights, rel=1e-5)
        for expert in chosen:
            counts[expert] += 1
    assert tokens_per_expert.tolist() == counts


# --------------------------------------------------------------------------------------------------------------------
# MoERouter


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_experts, top_k", [(5, 1), (5, 2), (5, 5), (1, 1), (16, 3)])
def test_router_equals_the_loop(num_experts, top_k, normalize, scale):
    router, tokens = make_router(num_experts, top_k, normalize, scale), make_tokens(40)
    check_route(router, tokens, router(tokens))


def test_router_returns_a_plain_tuple_of_the_agreed_dtypes():
    router = make_router()
    outputs = router(make_tokens(7, dtype=torch.bfloat16))
    assert type(outputs) is tuple
    assert [o.dtype for o in outputs] == [torch.float32, torch.int64, torch.int32]
    assert [tuple(o.shape) for o in outputs] == [(7, 2), (7, 2), (5,)]


@pytest.mark.parametrize("autocast", [False, True])
def test_router_computes_in_float32_whatever_it_is_given(autocast):
    router = make_router(16, 3).bfloat16()
    tokens = make_tokens(40, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = router(tokens)
    # Logits rounded to bfloat16 would be off by 4e-3.
    check_route(router, tokens, outputs)


def test_expert_bias_changes_only_the_choice():
    router, tokens = make_router(), make_tokens(40)
    bias = [0.0, 0.0, 2.0, 0.0, -2.0]
    outputs = router(tokens, torch.tensor(bias))
    # The reference ranks by score plus bias and weighs by score.
    check_route(router, tokens, outputs, bias)
    assert outputs[2][2] == 40 and outputs[2][4] == 0
    assert not torch.equal(outputs[1], router(tokens)[1])


def test_expert_bias_gets_no_gradient():
    bias = torch.zeros(5, requires_grad=True)
    weights, _, _ = make_router()(make_tokens(4), bias)
    (weights**2).sum().backward()
    assert bias.grad is None or not bias.grad.any()


@pytest.mark.parametrize("normalize", [True, False])
def test_router_gradient_equals_finite_differences(normalize):
    router, tokens = make_router(normalize=normalize), make_tokens(20).requires_grad_()
    factors = make_tokens(20, seed=2)[:, :2]
    (router(tokens)[0] * factors).sum().backward()

    def objective(logits: list[list[float]]) -> float:
        total = 0.0
        for row, factor in zip(logits, factors.tolist(), strict=True):
            _, weights = reference_route(row, router.top_k, normalize)
            total += sum(w * f for w, f in zip(weights, factor, strict=True))
        return total

    step = 1e-4
    for parameter, gradient in ((router.weight, router.weight.grad), (tokens, tokens.grad)):
        for index in [(0, 0), (1, 5), (3, 11), (4, 2)]:
            values = []
            for sign in (1, -1):
                changed = parameter.detach().double().clone()
                changed[index] += sign * step
                weight, x = (changed, tokens) if parameter is router.weight else (router.weight, changed)
                values.append(objective((x.detach().double() @ weight.detach().double().T).tolist()))
            assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-5)
    assert router.weight.grad.abs().max() > 1e-2


def test_tap_sees_the_logits_and_the_choice():
    router, tokens, seen = make_router(), make_tokens(6), []
    router.tap.register_forward_hook(lambda module, args, output: seen.append(output))
    _, top_k_index, _ = router(tokens)
    [(router_logits, tapped_index, dropped)] = seen
    assert dropped is None
    assert router_logits.requires_grad
    torch.testing.assert_close(router_logits, torch.tensor(logits_of(router, tokens)).float())
    assert torch.equal(tapped_index, top_k_index)


def test_all_tokens_to_one_expert():
    router = make_router(5, 1)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[3] = 1.0
    weights, index, counts = router(torch.ones(9, HIDDEN_SIZE))
    assert index.tolist() == [[3]] * 9
    assert counts.tolist() == [0, 0, 0, 9, 0]
    assert weights.tolist() == [[1.0]] * 9


def test_count_assignments_equals_a_loop():
    top_k_index = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0]])
    assert count_assignments(top_k_index, 5).tolist() == [3, 2, 0, 3, 0]
