"""The router and its losses against per-token loops written from the formulas."""

from types import SimpleNamespace

import pytest
import torch
from helpers_model import reference_aux_loss, reference_route, reference_z_loss
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_hf.routing import (
    MoERouter,
    count_assignments,
    load_balancing_loss,
    router_losses,
    router_z_loss,
)

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
            logits, router.top_k, router.norm_topk_prob, router.routed_scaling_factor, bias
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
    [(router_logits, tapped_index)] = seen
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


def test_count_assignments_equals_a_loop_and_skips_masked_tokens():
    top_k_index = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0]])
    assert count_assignments(top_k_index, 5).tolist() == [3, 2, 0, 3, 0]
    mask = torch.tensor([True, False, True, False])
    assert count_assignments(top_k_index, 5, mask).tolist() == [2, 1, 0, 1, 0]


# --------------------------------------------------------------------------------------------------------------------
# The loss functions


def make_case(num_tokens: int, num_experts: int, top_k: int, seed: int, masked: float = 0.0):
    """Return random logits, the experts chosen by them, and a mask that hides about the given share of tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    chosen = [reference_route(row, top_k)[0] for row in logits.tolist()]
    mask = torch.rand(num_tokens, generator=generator) >= masked
    mask[0] = True
    return logits, torch.tensor(chosen), mask


def expected_losses(logits: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    rows, keep = logits.tolist(), mask.tolist()
    return reference_aux_loss(rows, chosen.tolist(), keep), reference_z_loss(rows, keep)


@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("num_experts, top_k", [(4, 1), (6, 2), (6, 6), (1, 1)])
def test_loss_functions_equal_the_formulas(num_experts, top_k, masked):
    logits, chosen, mask = make_case(30, num_experts, top_k, seed=num_experts + top_k, masked=masked)
    assert bool(mask.all()) == (masked == 0.0)
    aux, z = expected_losses(logits, chosen, mask)
    counts = count_assignments(chosen, num_experts, mask)
    shared = {"router_logits": logits, "token_mask": mask, "num_tokens": mask.sum()}
    assert load_balancing_loss(**shared, tokens_per_expert=counts).item() == pytest.approx(aux, rel=1e-5)
    assert router_z_loss(**shared).item() == pytest.approx(z, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balancing_loss_is_transformers_divided_by_k(top_k):
    logits, chosen, _ = make_case(24, 6, top_k, seed=5)
    attention_mask = torch.ones(4, 6)
    attention_mask[1, 4:] = 0
    theirs = load_balancing_loss_func((logits,), 6, top_k, attention_mask)
    mask = attention_mask.flatten().bool()
    ours = router_losses((logits,), (chosen,), mask).aux
    assert ours.item() == pytest.approx(theirs.item() / top_k, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6])
def test_perfect_balance_costs_one(top_k):
    num_experts = 6
    # Token t goes to the experts t, t + 1, ... in turn, so every expert gets the same number.
    chosen = torch.tensor([[(t + k) % num_experts for k in range(top_k)] for t in range(12)])
    mask = torch.ones(12, dtype=torch.bool)
    logits = torch.randn(12, num_experts, generator=torch.Generator().manual_seed(0))
    assert router_losses((logits,), (chosen,), mask).aux.item() == pytest.approx(1.0, rel=1e-6)
    # Even probabilities cost 1 too, whatever the load.
    all_to_first = torch.arange(top_k).expand(12, top_k)
    assert router_losses((torch.zeros(12, 6),), (all_to_first,), mask).aux.item() == pytest.approx(1.0, rel=1e-6)


def test_collapse_costs_the_number_of_experts():
    logits = torch.zeros(10, 8)
    logits[:, 2] = 50.0
    chosen, mask = torch.full((10, 1), 2), torch.ones(10, dtype=torch.bool)
    assert router_losses((logits,), (chosen,), mask).aux.item() == pytest.approx(8.0, rel=1e-6)


def test_gradients_pass_gradcheck_in_float64():
    logits, chosen, mask = make_case(7, 4, 2, seed=3, masked=0.3)
    logits = logits.double().requires_grad_()
    counts = count_assignments(chosen, 4, mask)

    def aux(x: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss(router_logits=x, tokens_per_expert=counts, token_mask=mask, num_tokens=mask.sum())

    def z(x: torch.Tensor) -> torch.Tensor:
        return router_z_loss(router_logits=x, token_mask=mask, num_tokens=mask.sum())

    assert torch.autograd.gradcheck(aux, (logits,))
    assert torch.autograd.gradcheck(z, (logits,))
    assert torch.autograd.gradcheck(lambda x: torch.cat(router_losses((x,), (chosen,), mask)), (logits,))
    # gradcheck compares with differences, so a loss cut off from the logits would fail; masked tokens get nothing.
    (aux(logits) + z(logits)).backward()
    assert logits.grad[mask].abs().min(dim=1).values.max() > 0
    assert not logits.grad[~mask].any()


# --------------------------------------------------------------------------------------------------------------------
# router_losses


def test_layers_are_not_pooled():
    cases = [make_case(20, 4, 2, seed=s) for s in (0, 1, 2)]
    mask = make_case(20, 4, 2, seed=9, masked=0.4)[2]
    losses = router_losses(tuple(c[0] for c in cases), tuple(c[1] for c in cases), mask)
    for layer, (logits, chosen, _) in enumerate(cases):
        aux, z = expected_losses(logits, chosen, mask)
        assert losses.aux[layer].item() == pytest.approx(aux, rel=1e-5)
        assert losses.z[layer].item() == pytest.approx(z, rel=1e-5)


class Ranks:
    """Data-parallel ranks played one after the other: every rank reports first, then computes with the sums."""

    def __init__(self, batches: list[tuple], **options) -> None:
        self.num_calls = 0
        reported: list[torch.Tensor] = []

        def report(statistics: torch.Tensor) -> torch.Tensor:
            assert not statistics.is_floating_point() and not statistics.requires_grad
            reported.append(statistics.clone())
            return statistics

        for batch in batches:
            router_losses(*batch, reduce_statistics=report, **options)
        total = sum(reported)

        def reduce(statistics: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            return total.clone()

        self.losses = [router_losses(*batch, reduce_statistics=reduce, **options) for batch in batches]
        assert self.num_calls == len(batches), "there must be one collective for all layers together"


def make_batch(num_tokens: int, seed: int, num_layers: int = 2, masked: float = 0.3) -> tuple:
    layers = [make_case(num_tokens, 5, 2, seed=100 * seed + layer) for layer in range(num_layers)]
    mask = make_case(num_tokens, 5, 2, seed=100 * seed + 50, masked=masked)[2]
    return tuple(c[0].requires_grad_() for c in layers), tuple(c[1] for c in layers), mask


def join(batches: list[tuple]) -> tuple:
    """Return the one batch that holds all tokens of the given ones."""
    logits = tuple(torch.cat(layer).detach().requires_grad_() for layer in zip(*(b[0] for b in batches), strict=True))
    indices = tuple(torch.cat(layer) for layer in zip(*(b[1] for b in batches), strict=True))
    return logits, indices, torch.cat([b[2] for b in batches])


def expected_per_layer(batch: tuple) -> list[tuple[float, float]]:
    return [expected_losses(logits, chosen, batch[2]) for logits, chosen in zip(*batch[:2], strict=True)]


@pytest.mark.parametrize("sizes", [(12,), (12, 12), (3, 20, 8, 1)])
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(sizes):
    batches = [make_batch(size, seed) for seed, size in enumerate(sizes)]
    whole = join(batches)
    losses = Ranks(batches).losses
    for layer, (aux, z) in enumerate(expected_per_layer(whole)):
        assert sum(r.aux[layer].item() for r in losses) / len(sizes) == pytest.approx(aux, rel=1e-5)
        assert sum(r.z[layer].item() for r in losses) / len(sizes) == pytest.approx(z, rel=1e-5)

    # The same must hold for the gradient: averaged over ranks it is the whole batch's, token by token.
    sum(r.aux.sum() + r.z.sum() for r in losses).div(len(sizes)).backward()
    alone = router_losses(*whole)
    (alone.aux.sum() + alone.z.sum()).backward()
    for layer in range(2):
        gradient = torch.cat([batch[0][layer].grad for batch in batches])
        torch.testing.assert_close(gradient, whole[0][layer].grad, rtol=1e-5, atol=1e-8)
        assert gradient.abs().max() > 1e-4


def test_local_scope_uses_only_the_rank_itself():
    batches = [make_batch(size, seed) for seed, size in enumerate((5, 17))]
    reduced = Ranks(batches).losses
    for batch, everyone in zip(batches, reduced, strict=True):
        local = router_losses(*batch)
        for layer, (aux, z) in enumerate(expected_per_layer(batch)):
            assert local.aux[layer].item() == pytest.approx(aux, rel=1e-5)
            assert local.z[layer].item() == pytest.approx(z, rel=1e-5)
        assert not torch.allclose(local.aux, everyone.aux, rtol=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_shares_of_ranks_and_accumulation_steps_add_up(as_tensor):
    steps = [
        [make_batch(size, 10 * s + r) for r, size in enumerate(sizes)] for s, sizes in enumerate([(9, 4), (2, 15)])
    ]
    batches = [batch for step in steps for batch in step]
    num_tokens = sum(batch[2].sum() for batch in batches)
    shares = [Ranks(step, num_tokens_in_batch=num_tokens if as_tensor else float(num_tokens)).losses for step in steps]

    per_step = [expected_per_layer(join(step)) for step in steps]
    tokens_per_step = [sum(int(batch[2].sum()) for batch in step) for step in steps]
    everything = expected_per_layer(join(batches))
    for layer in range(2):
        # The z-loss is a plain mean over tokens, so the shares add up to the one big batch.
        z = sum(rank.z[layer].item() for step in shares for rank in step)
        assert z == pytest.approx(everything[layer][1], rel=1e-5)
        # The balancing loss is a product of two means: its unit is the global micro-batch.
        aux = sum(rank.aux[layer].item() for step in shares for rank in step)
        expected = sum(n * losses[layer][0] for n, losses in zip(tokens_per_step, per_step, strict=True))
        assert aux == pytest.approx(expected / int(num_tokens), rel=1e-5)


def test_local_shares_weigh_each_rank_by_its_tokens():
    batches = [make_batch(size, seed) for seed, size in enumerate((6, 15))]
    counts = [int(batch[2].sum()) for batch in batches]
    shares = [router_losses(*batch, num_tokens_in_batch=sum(counts)) for batch in batches]
    for layer in range(2):
        expected = sum(n * expected_per_layer(batch)[layer][0] for n, batch in zip(counts, batches, strict=True))
        assert sum(s.aux[layer].item() for s in shares) == pytest.approx(expected / sum(counts), rel=1e-5)


def test_one_token():
    batch = make_batch(1, seed=4, masked=0.0)
    losses = router_losses(*batch)
    for layer, (aux, z) in enumerate(expected_per_layer(batch)):
        assert losses.aux[layer].item() == pytest.approx(aux, rel=1e-5)
        assert losses.z[layer].item() == pytest.approx(z, rel=1e-5)


def test_experts_without_tokens_get_a_gradient_that_raises_them():
    logits = torch.zeros(8, 4, requires_grad=True)
    chosen = torch.tensor([[0, 1]]).expand(8, 2)
    router_losses((logits,), (chosen,), torch.ones(8, dtype=torch.bool)).aux.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 2:] < 0).all() and (logits.grad[:, :2] > 0).all()


@pytest.mark.parametrize("num_tokens_in_batch", [None, 20])
def test_a_fully_masked_micro_batch_costs_nothing(num_tokens_in_batch):
    logits, indices, mask = make_batch(6, seed=2)
    losses = router_losses(logits, indices, torch.zeros_like(mask), num_tokens_in_batch=num_tokens_in_batch)
    assert losses.aux.tolist() == [0.0, 0.0] and losses.z.tolist() == [0.0, 0.0]
    (losses.aux.sum() + losses.z.sum()).backward()
    for tensor in logits:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_a_fully_masked_rank_does_not_disturb_the_others():
    batches = [make_batch(9, seed=0), make_batch(7, seed=1)]
    batches[1] = (*batches[1][:2], torch.zeros(7, dtype=torch.bool))
    losses = Ranks(batches).losses
    for layer, (aux, z) in enumerate(expected_per_layer(batches[0])):
        assert sum(r.aux[layer].item() for r in losses) / 2 == pytest.approx(aux, rel=1e-5)
        assert sum(r.z[layer].item() for r in losses) / 2 == pytest.approx(z, rel=1e-5)
