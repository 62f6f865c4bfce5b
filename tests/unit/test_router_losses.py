"""The router's losses and counts against per-token loops written from the formulas."""

import pytest
import torch
from helpers_model import reference_aux_loss, reference_route, reference_z_loss
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_hf.router_losses import (
    RouterLosses,
    count_by_sequence,
    count_layers,
    load_balancing_loss,
    router_losses,
    router_z_loss,
)


def test_counts_are_of_each_sequence_and_skip_masked_tokens():
    top_k_index = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 5]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert count_by_sequence(top_k_index, 5, mask).tolist() == [[2, 2, 0, 3, 0]], "5 of 5 experts stands for none"
    mask = torch.tensor([[True, False], [True, True]])
    assert count_by_sequence(top_k_index, 5, mask).tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 1, 0]]


def losses_of(logits: tuple, indices: tuple, mask: torch.Tensor, **options) -> RouterLosses:
    """The losses of tokens in one sequence, of which `mask` is `(T,)`."""
    counts = count_layers(indices, logits[0].shape[-1], mask[None])
    return router_losses(logits, counts, mask[None], **options)


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
    counts = count_by_sequence(chosen, num_experts, mask[None])[0]
    shared = {"router_logits": logits, "token_mask": mask[None], "num_tokens": mask.sum()}
    assert load_balancing_loss(**shared, tokens_per_expert=counts).item() == pytest.approx(aux, rel=1e-5)
    assert router_z_loss(**shared).item() == pytest.approx(z, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balancing_loss_is_transformers_divided_by_k(top_k):
    logits, chosen, _ = make_case(24, 6, top_k, seed=5)
    attention_mask = torch.ones(4, 6)
    attention_mask[1, 4:] = 0
    theirs = load_balancing_loss_func((logits,), 6, top_k, attention_mask)
    mask = attention_mask.flatten().bool()
    ours = losses_of((logits,), (chosen,), mask).aux
    assert ours.item() == pytest.approx(theirs.item() / top_k, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6])
def test_perfect_balance_costs_one(top_k):
    num_experts = 6
    # Token t goes to the experts t, t + 1, ... in turn, so every expert gets the same number.
    chosen = torch.tensor([[(t + k) % num_experts for k in range(top_k)] for t in range(12)])
    mask = torch.ones(12, dtype=torch.bool)
    logits = torch.randn(12, num_experts, generator=torch.Generator().manual_seed(0))
    assert losses_of((logits,), (chosen,), mask).aux.item() == pytest.approx(1.0, rel=1e-6)
    # Even probabilities cost 1 too, whatever the load.
    all_to_first = torch.arange(top_k).expand(12, top_k)
    assert losses_of((torch.zeros(12, 6),), (all_to_first,), mask).aux.item() == pytest.approx(1.0, rel=1e-6)


def test_collapse_costs_the_number_of_experts():
    logits = torch.zeros(10, 8)
    logits[:, 2] = 50.0
    chosen, mask = torch.full((10, 1), 2), torch.ones(10, dtype=torch.bool)
    assert losses_of((logits,), (chosen,), mask).aux.item() == pytest.approx(8.0, rel=1e-6)


def test_gradients_pass_gradcheck_in_float64():
    logits, chosen, mask = make_case(7, 4, 2, seed=3, masked=0.3)
    logits = logits.double().requires_grad_()
    counts = count_by_sequence(chosen, 4, mask[None])[0]

    def aux(x: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss(
            router_logits=x, tokens_per_expert=counts, token_mask=mask[None], num_tokens=mask.sum()
        )

    def z(x: torch.Tensor) -> torch.Tensor:
        return router_z_loss(router_logits=x, token_mask=mask[None], num_tokens=mask.sum())

    assert torch.autograd.gradcheck(aux, (logits,))
    assert torch.autograd.gradcheck(z, (logits,))
    assert torch.autograd.gradcheck(lambda x: torch.cat(losses_of((x,), (chosen,), mask)), (logits,))
    # gradcheck compares with differences, so a loss cut off from the logits would fail; masked tokens get nothing.
    (aux(logits) + z(logits)).backward()
    assert logits.grad[mask].abs().min(dim=1).values.max() > 0
    assert not logits.grad[~mask].any()


# --------------------------------------------------------------------------------------------------------------------
# All layers together


def test_layers_are_not_pooled():
    cases = [make_case(20, 4, 2, seed=s) for s in (0, 1, 2)]
    mask = make_case(20, 4, 2, seed=9, masked=0.4)[2]
    losses = losses_of(tuple(c[0] for c in cases), tuple(c[1] for c in cases), mask)
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
            losses_of(*batch, reduce_statistics=report, **options)
        total = sum(reported)

        def reduce(statistics: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            return total.clone()

        self.losses = [losses_of(*batch, reduce_statistics=reduce, **options) for batch in batches]
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
    alone = losses_of(*whole)
    (alone.aux.sum() + alone.z.sum()).backward()
    for layer in range(2):
        gradient = torch.cat([batch[0][layer].grad for batch in batches])
        torch.testing.assert_close(gradient, whole[0][layer].grad, rtol=1e-5, atol=1e-8)
        assert gradient.abs().max() > 1e-4


def test_local_scope_uses_only_the_rank_itself():
    batches = [make_batch(size, seed) for seed, size in enumerate((5, 17))]
    reduced = Ranks(batches).losses
    for batch, everyone in zip(batches, reduced, strict=True):
        local = losses_of(*batch)
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
    shares = [losses_of(*batch, num_tokens_in_batch=sum(counts)) for batch in batches]
    for layer in range(2):
        expected = sum(n * expected_per_layer(batch)[layer][0] for n, batch in zip(counts, batches, strict=True))
        assert sum(s.aux[layer].item() for s in shares) == pytest.approx(expected / sum(counts), rel=1e-5)


def test_one_token():
    batch = make_batch(1, seed=4, masked=0.0)
    losses = losses_of(*batch)
    for layer, (aux, z) in enumerate(expected_per_layer(batch)):
        assert losses.aux[layer].item() == pytest.approx(aux, rel=1e-5)
        assert losses.z[layer].item() == pytest.approx(z, rel=1e-5)


def test_experts_without_tokens_get_a_gradient_that_raises_them():
    logits = torch.zeros(8, 4, requires_grad=True)
    chosen = torch.tensor([[0, 1]]).expand(8, 2)
    losses_of((logits,), (chosen,), torch.ones(8, dtype=torch.bool)).aux.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 2:] < 0).all() and (logits.grad[:, :2] > 0).all()


@pytest.mark.parametrize("num_tokens_in_batch", [None, 20])
def test_a_fully_masked_micro_batch_costs_nothing(num_tokens_in_batch):
    logits, indices, mask = make_batch(6, seed=2)
    losses = losses_of(logits, indices, torch.zeros_like(mask), num_tokens_in_batch=num_tokens_in_batch)
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
