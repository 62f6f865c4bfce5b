"""Sigmoid scores, groups and the correction bias against loops from the formulas, and Transformers' own routers."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers_model import reference_aux_loss, reference_z_loss
from oracle import choose_experts
from transformers import DeepseekV2Config, DeepseekV3Config, Dots1Config, Glm4MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from moe_hf.router_losses import RouterLosses, count_by_sequence, count_layers, load_balancing_loss, router_losses
from moe_hf.router_selection import keep_best_groups
from moe_hf.routing import MoERouter

HIDDEN_SIZE = 12


def make_config(**changes) -> SimpleNamespace:
    values = {
        "hidden_size": HIDDEN_SIZE,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "group_scoring_func": "top2_sum",
        "router_balancing": "loss_free",
        "topk_before_softmax": False,
        "router_jitter_noise": 0.0,
        "expert_capacity_factor": None,
    }
    return SimpleNamespace(**(values | changes))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_router(config: SimpleNamespace) -> MoERouter:
    """Return a router whose bias, where there is one, makes about half of the scores negative."""
    router = MoERouter(config)
    with torch.no_grad():
        router.weight.copy_(random(config.num_experts, HIDDEN_SIZE, seed=0))
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(0.5 * random(config.num_experts, seed=1) - 0.5)
    return router


def reference_scores(logits: list[float], scoring_func: str) -> list[float]:
    if scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def reference_route(logits: list[float], bias: list[float], config) -> tuple[list[int], list[float]]:
    """Return one token's experts, best first, and their weights."""
    scores = reference_scores(logits, config.scoring_func)
    chosen = choose_experts(scores, bias, config)
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return chosen, [scores[expert] / total * config.routed_scaling_factor for expert in chosen]


def logits_of(router: MoERouter, tokens: torch.Tensor) -> list[list[float]]:
    return (tokens.detach().double() @ router.weight.detach().double().T).tolist()


CONFIGS = [
    {"n_group": 1, "topk_group": 1},
    {"n_group": 1, "topk_group": 1, "router_balancing": "none"},
    {"router_balancing": "aux_loss"},
    {},
    {"topk_group": 1},
    {"topk_group": 4},
    {"group_scoring_func": "max"},
    {"n_group": 12, "topk_group": 5, "group_scoring_func": "max"},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"scoring_func": "softmax"},
    {"scoring_func": "softmax", "group_scoring_func": "max", "router_balancing": "none", "norm_topk_prob": False},
    {"num_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_router_equals_the_loop(changes):
    config = make_config(**changes)
    router, tokens = make_router(config), random(60, HIDDEN_SIZE, seed=2)
    weights, index, counts = router(tokens)
    bias = router.e_score_correction_bias
    assert (bias is not None) == (config.router_balancing == "loss_free")
    bias = [0.0] * config.num_experts if bias is None else bias.tolist()
    expected_counts = [0] * config.num_experts
    for t, logits in enumerate(logits_of(router, tokens)):
        chosen, expected = reference_route(logits, bias, config)
        assert index[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-5)
        for expert in chosen:
            expected_counts[expert] += 1
    assert counts.tolist() == expected_counts


@pytest.mark.parametrize("changes", [{}, {"n_group": 1, "topk_group": 1}, {"scoring_func": "softmax"}], ids=str)
def test_both_biases_are_added_for_the_choice_and_for_the_groups(changes):
    """AutoEP's own, an argument, comes on top of the router's."""
    config = make_config(**changes)
    router, tokens = make_router(config), random(60, HIDDEN_SIZE, seed=2)
    other = random(12, seed=5)
    weights, index, _ = router(tokens, other)
    sums = (router.e_score_correction_bias + other).tolist()
    for t, logits in enumerate(logits_of(router, tokens)):
        chosen, expected = reference_route(logits, sums, config)
        assert index[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(index, router(tokens)[1])


def test_a_group_outside_the_best_is_never_chosen_however_negative_the_best_are():
    router = make_router(make_config(num_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2))
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([-3.0, -3, -2, -9, -4, -4, -5, -5]))
    _, index, _ = router(random(30, HIDDEN_SIZE, seed=3))
    # Groups are worth about -5, -10, -7 and -9: the first and the third stay, and experts 0, 1, 4 and 5 are in them.
    assert index.sort(dim=-1).values.tolist() == [[0, 1, 4, 5]] * 30


def test_groups_that_stay_keep_their_scores():
    scores = torch.tensor([[0.1, 0.2, 0.9, 0.0, 0.5, 0.45]])
    inf = float("inf")
    by_sum = keep_best_groups(scores, 3, 1, "top2_sum")
    by_max = keep_best_groups(scores, 3, 1, "max")
    torch.testing.assert_close(by_sum, torch.tensor([[-inf, -inf, -inf, -inf, 0.5, 0.45]]), rtol=0, atol=0)
    torch.testing.assert_close(by_max, torch.tensor([[-inf, -inf, 0.9, 0.0, -inf, -inf]]), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# Transformers' own routers

SIZES = {"hidden_size": HIDDEN_SIZE, "num_attention_heads": 4, "n_routed_experts": 16, "num_experts_per_tok": 4}
GROUPED = {"n_group": 4, "topk_group": 2}
THEIRS = {
    "glm4_moe": (Glm4MoeTopkRouter, Glm4MoeConfig, GROUPED, {}),
    "dots1": (Dots1TopkRouter, Dots1Config, GROUPED, {}),
    "deepseek_v3": (DeepseekV3TopkRouter, DeepseekV3Config, GROUPED, {}),
    "glm4_moe_without_groups": (Glm4MoeTopkRouter, Glm4MoeConfig, {"n_group": 1, "topk_group": 1}, {}),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        DeepseekV2Config,
        GROUPED | {"topk_method": "group_limited_greedy"},
        {"scoring_func": "softmax", "group_scoring_func": "max", "router_balancing": "none", "norm_topk_prob": False},
    ),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_router_equals_transformers(name, normalize):
    router_class, config_class, groups, changes = THEIRS[name]
    shared = {"norm_topk_prob": normalize, "routed_scaling_factor": 2.5}
    theirs = router_class(config_class(**SIZES, **groups, **shared))
    with torch.no_grad():
        theirs.weight.copy_(random(16, HIDDEN_SIZE, seed=0))
        if name != "deepseek_v2":
            theirs.e_score_correction_bias.copy_(0.5 * random(16, seed=1) - 0.5)
    groups = {key: value for key, value in groups.items() if key != "topk_method"}
    config = make_config(**({"num_experts": 16, "num_experts_per_tok": 4} | groups | shared | changes))
    ours = MoERouter(config)
    ours.load_state_dict(theirs.state_dict())

    tokens = random(500, HIDDEN_SIZE, seed=3)
    gradients, dense = [], []
    for router in (ours, theirs):
        x = tokens.clone().requires_grad_()
        outputs = router(x)
        weights, index = outputs[:2] if router is ours else (outputs[1], outputs[2])
        # They give a token's experts in another order.
        dense.append(torch.zeros(500, 16).scatter(1, index, weights))
        (dense[-1] * random(500, 16, seed=4)).sum().backward()
        gradients.append((x.grad, router.weight.grad))
    assert torch.equal(dense[0] > 0, dense[1] > 0)
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"n_group": 1, "topk_group": 1}], ids=str)
def test_router_gradient_equals_finite_differences(changes):
    config = make_config(**changes)
    router, tokens = make_router(config), random(20, HIDDEN_SIZE, seed=2).requires_grad_()
    factors, bias = random(20, 3, seed=3), router.e_score_correction_bias.tolist()
    (router(tokens)[0] * factors).sum().backward()

    def objective(weight: torch.Tensor, x: torch.Tensor) -> float:
        total = 0.0
        for row, factor in zip((x.double() @ weight.double().T).tolist(), factors.tolist(), strict=True):
            total += sum(w * f for w, f in zip(reference_route(row, bias, config)[1], factor, strict=True))
        return total

    step = 1e-5
    largest = 0.0
    for parameter, gradient in ((router.weight, router.weight.grad), (tokens, tokens.grad)):
        for index in [(0, 0), (1, 5), (3, 11), (4, 2), (9, 7)]:
            values = []
            for sign in (1, -1):
                changed = parameter.detach().double().clone()
                changed[index] += sign * step
                pair = (changed, tokens) if parameter is router.weight else (router.weight, changed)
                values.append(objective(*(part.detach() for part in pair)))
            assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-5)
            largest = max(largest, abs(gradient[index].item()))
    assert largest > 1e-2


def test_the_bias_gets_no_gradient():
    router = make_router(make_config())
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    before = router.e_score_correction_bias.clone()
    router(random(9, HIDDEN_SIZE, seed=0))[0].square().sum().backward()
    assert router.e_score_correction_bias.grad is None and not router.e_score_correction_bias.requires_grad
    assert torch.equal(router.e_score_correction_bias, before)


def test_scores_that_underflow_are_still_weights():
    """A bias can choose experts whose scores are all 0 in float32."""
    router = make_router(make_config(n_group=1, topk_group=1))
    with torch.no_grad():
        router.weight.fill_(-100.0)
    weights, _, _ = router(torch.ones(4, HIDDEN_SIZE, requires_grad=True))
    weights.sum().backward()
    assert torch.isfinite(weights).all() and torch.isfinite(router.weight.grad).all()


# --------------------------------------------------------------------------------------------------------------------
# Losses


def losses_of(logits: tuple, indices: tuple, mask: torch.Tensor, **options) -> RouterLosses:
    """The losses of tokens in one sequence, of which `mask` is `(T,)`."""
    counts = count_layers(indices, logits[0].shape[-1], mask[None])
    return router_losses(logits, counts, mask[None], **options)


def probabilities_as_logits(logits: torch.Tensor) -> list[list[float]]:
    """Return numbers whose softmax is the normalised sigmoid: the reference knows softmax only."""
    return [[math.log(score) for score in reference_scores(row, "sigmoid")] for row in logits.tolist()]


@pytest.mark.parametrize("masked", [False, True])
def test_balancing_loss_normalises_the_scores_of_each_token(masked):
    logits = 2 * random(30, 6, seed=0)
    chosen = logits.topk(2).indices
    mask = torch.arange(30) % 3 != 0 if masked else torch.ones(30, dtype=torch.bool)
    losses = losses_of((logits,), (chosen,), mask, scoring_func="sigmoid")
    expected = reference_aux_loss(probabilities_as_logits(logits), chosen.tolist(), mask.tolist())
    assert losses.aux.item() == pytest.approx(expected, rel=1e-5)
    # The z-loss is about logits, whatever becomes of them.
    assert losses.z.item() == pytest.approx(reference_z_loss(logits.tolist(), mask.tolist()), rel=1e-5)
    assert losses.aux.item() != pytest.approx(losses_of((logits,), (chosen,), mask).aux.item(), rel=1e-3)


def test_gradient_of_the_balancing_loss_passes_gradcheck_in_float64():
    logits = random(7, 4, seed=3).double().requires_grad_()
    chosen = logits.topk(2).indices
    mask = torch.tensor([True, True, False, True, True, False, True])
    counts = count_by_sequence(chosen, 4, mask[None])[0]

    def aux(x: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss(
            router_logits=x, tokens_per_expert=counts, token_mask=mask[None], num_tokens=5, scoring_func="sigmoid"
        )

    assert torch.autograd.gradcheck(aux, (logits,))
    aux(logits).backward()
    assert logits.grad[mask].abs().min(dim=1).values.max() > 0 and not logits.grad[~mask].any()


def test_balancing_loss_of_very_negative_logits_is_finite():
    logits = torch.tensor([[-200.0, -201.0], [-150.0, -150.0]], requires_grad=True)
    loss = losses_of((logits,), (torch.tensor([[0], [1]]),), torch.ones(2).bool(), scoring_func="sigmoid").aux
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.0) and torch.isfinite(logits.grad).all()


# --------------------------------------------------------------------------------------------------------------------
# The buffer's dtype


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.float16),
    "to_like": lambda module: module.to(torch.zeros(1, dtype=torch.bfloat16)),
    "parent": lambda module: torch.nn.Sequential(module).bfloat16()[0],
    "there_and_back": lambda module: module.bfloat16().float(),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_leaves_every_bit_of_the_bias(name):
    router = make_router(make_config())
    before = router.e_score_correction_bias.clone()
    assert not torch.equal(before.bfloat16().float(), before)
    cast = CASTS[name](copy.deepcopy(router))
    assert cast.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(cast.e_score_correction_bias, before)
    if name != "there_and_back":
        assert cast.weight.dtype != torch.float32
    assert "e_score_correction_bias" in cast.state_dict()


def test_the_bias_moves_between_devices():
    router = make_router(make_config()).to("meta")
    assert router.e_score_correction_bias.is_meta
    assert router.bfloat16().e_score_correction_bias.dtype == torch.float32
    assert router.to_empty(device="cpu").e_score_correction_bias.device.type == "cpu"
