"""The balancing loss of each sequence (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20) against a loop."""

import itertools

import pytest
import torch
from helpers_model import reference_aux_loss, reference_z_loss
from routing_reference import random, sequence_aux_loss

from moe_hf.router_losses import RouterLosses, count_layers, router_losses

NUM_EXPERTS = 5
SCOPES = ("global", "local", "sequence")


def make_batch(batch_size: int, length: int, seed: int, num_layers: int = 1, top_k: int = 2, masked: float = 0.3):
    """Return random logits and choices of every layer, and a mask that leaves every sequence a token."""
    logits = tuple(
        (2 * random(batch_size * length, NUM_EXPERTS, seed=10 * seed + layer)).requires_grad_()
        for layer in range(num_layers)
    )
    indices = tuple(layer.detach().topk(top_k).indices for layer in logits)
    mask = torch.rand(batch_size, length, generator=torch.Generator().manual_seed(seed)) >= masked
    mask[:, :1] = True
    return logits, indices, mask


def losses_of(batch: tuple, scoring_func: str = "softmax", **options) -> RouterLosses:
    logits, indices, mask = batch
    counts = count_layers(indices, NUM_EXPERTS, mask)
    return router_losses(logits, counts, mask, scoring_func=scoring_func, **options)


def expected_aux(batch: tuple, layer: int = 0, **options) -> torch.Tensor:
    logits, indices, mask = batch
    return sequence_aux_loss(logits[layer].detach().double(), indices[layer].tolist(), mask.tolist(), **options)


def test_the_reference_itself_on_paper():
    logits = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()
    index = [[0], [0], [1], [0]]
    # First sequence: f = (2, 0), P = (0.75, 0.25); second: f = (1, 1).
    both = [[True, True], [True, True]]
    assert sequence_aux_loss(logits, index, both).item() == pytest.approx((2 * 1.5 + 2 * 1.0) / 4)
    # Without the last token the second has f = (0, 2), P = (0.2, 0.8), and one token of three.
    assert sequence_aux_loss(logits, index, [[True, True], [True, False]]).item() == pytest.approx((3 + 1.6) / 3)
    # A hidden sequence counts for nothing.
    assert sequence_aux_loss(logits, index, [[True, True], [False, False]]).item() == pytest.approx(1.5)
    assert sequence_aux_loss(logits, index, both, num_tokens_in_batch=8).item() == pytest.approx(5 / 8)
    # Sigmoid scores are divided by their sum: 0.9 and 0.3 are worth 3/4 and 1/4.
    logits = torch.tensor([[0.9, 0.3]], dtype=torch.float64).logit()
    assert sequence_aux_loss(logits, [[0]], [[True]], "sigmoid").item() == pytest.approx(1.5)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("batch_size, length, top_k", [(1, 12, 2), (4, 6, 2), (3, 5, 1), (2, 4, 5), (7, 1, 2)])
def test_loss_and_gradient_equal_the_loop(batch_size, length, top_k, masked, scoring_func):
    logits, indices, mask = batch = make_batch(batch_size, length, seed=3, num_layers=2, top_k=top_k, masked=masked)
    losses = losses_of(batch, scope="sequence", scoring_func=scoring_func)
    assert losses.aux.shape == losses.z.shape == (2,)
    for layer in range(2):
        exact = logits[layer].detach().double().requires_grad_()
        expected = sequence_aux_loss(exact, indices[layer].tolist(), mask.tolist(), scoring_func)
        assert losses.aux[layer].item() == pytest.approx(expected.item(), rel=1e-5)
        z = reference_z_loss(logits[layer].tolist(), mask.flatten().tolist())
        assert losses.z[layer].item() == pytest.approx(z, rel=1e-5)
        [gradient] = torch.autograd.grad(losses.aux[layer], logits[layer], retain_graph=True)
        [wanted] = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_pass_gradcheck_in_float64(scope, scoring_func):
    logits, indices, mask = make_batch(3, 4, seed=1)
    logits = logits[0].detach().double().requires_grad_()

    def losses(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(losses_of(((x,), indices, mask), scope=scope, scoring_func=scoring_func))

    assert not mask.all()
    assert losses(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(losses, (logits,))
    losses(logits).sum().backward()
    flat = mask.flatten()
    assert logits.grad[flat].abs().amax(1).min() > 0 and not logits.grad[~flat].any()


def test_the_reference_passes_gradcheck():
    logits, indices, mask = make_batch(2, 3, seed=1)
    for scoring_func in ("softmax", "sigmoid"):
        exact = logits[0].detach().double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, f=scoring_func: sequence_aux_loss(x, indices[0].tolist(), mask.tolist(), f), (exact,)
        )


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_other_scopes_pool_the_sequences(scope, scoring_func):
    """Switch, arXiv 2101.03961, equations 4 to 6: one sequence of all tokens, as the loop sees it."""
    logits, indices, mask = batch = make_batch(4, 6, seed=3)
    aux = losses_of(batch, scope=scope, scoring_func=scoring_func).aux.item()
    pooled = (logits, indices, mask.flatten()[None])
    assert aux == pytest.approx(expected_aux(pooled, scoring_func=scoring_func).item(), rel=1e-5)
    assert aux != pytest.approx(expected_aux(batch, scoring_func=scoring_func).item(), rel=1e-2)
    if scoring_func == "softmax":
        expected = reference_aux_loss(logits[0].tolist(), indices[0].tolist(), mask.flatten().tolist())
        assert aux == pytest.approx(expected, rel=1e-5)


def test_scope_matters_only_beyond_one_sequence():
    batch = make_batch(1, 9, seed=2)
    losses = [losses_of(batch, scope=scope) for scope in SCOPES]
    assert losses[0].aux.item() == pytest.approx(losses[1].aux.item(), rel=1e-6)
    assert losses[0].aux.item() == pytest.approx(losses[2].aux.item(), rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_perfect_balance_in_every_sequence_costs_one(top_k):
    index = torch.tensor([[(t + k) % NUM_EXPERTS for k in range(top_k)] for t in range(30)])
    logits = random(30, NUM_EXPERTS, seed=0)
    losses = losses_of(((logits,), (index,), torch.ones(3, 10).bool()), scope="sequence")
    assert losses.aux.item() == pytest.approx(1.0, rel=1e-6)


def test_a_batch_that_is_balanced_only_as_a_whole_costs_more():
    """Each sequence goes to an expert of its own: in the other scopes this is perfect balance."""
    index = torch.arange(NUM_EXPERTS).repeat_interleave(4)[:, None]
    logits = 50 * torch.nn.functional.one_hot(index[:, 0], NUM_EXPERTS).float()
    batch = (logits,), (index,), torch.ones(NUM_EXPERTS, 4).bool()
    aux = {scope: losses_of(batch, scope=scope).aux.item() for scope in SCOPES}
    assert aux == pytest.approx({"global": 1.0, "local": 1.0, "sequence": NUM_EXPERTS}, rel=1e-6)


def rows(batch: tuple, first: int, last: int) -> tuple:
    """Return the sequences of a batch from `first` up to `last`."""
    logits, indices, mask = batch
    tokens = slice(first * mask.shape[1], last * mask.shape[1])
    return (
        tuple(layer.detach()[tokens].requires_grad_() for layer in logits),
        tuple(layer[tokens] for layer in indices),
        mask[first:last],
    )


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 2, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_shares_of_accumulation_steps_add_up_to_the_whole_batch(cuts, as_tensor):
    """Unlike in the other scopes exactly so, because no sequence is ever divided."""
    whole = make_batch(6, 7, seed=5, num_layers=2, masked=0.5)
    num_tokens = whole[2].sum() if as_tensor else int(whole[2].sum())
    parts = [rows(whole, first, last) for first, last in itertools.pairwise(cuts)]
    shares = [losses_of(part, scope="sequence", num_tokens_in_batch=num_tokens) for part in parts]
    sum(share.aux.sum() for share in shares).backward()
    alone = losses_of(whole, scope="sequence")
    alone.aux.sum().backward()
    for layer in range(2):
        total = sum(share.aux[layer].item() for share in shares)
        assert total == pytest.approx(expected_aux(whole, layer).item(), rel=1e-5)
        for part in parts:
            share = losses_of(part, scope="sequence", num_tokens_in_batch=num_tokens)
            expected = expected_aux(part, layer, num_tokens_in_batch=int(num_tokens)).item()
            assert share.aux[layer].item() == pytest.approx(expected, rel=1e-5)
        gradient = torch.cat([part[0][layer].grad for part in parts])
        torch.testing.assert_close(gradient, whole[0][layer].grad, rtol=1e-5, atol=1e-7)


def test_mean_over_ranks_is_the_loss_of_the_whole_batch():
    """Ranks played one after the other: each reports its statistics first, then computes with the sums."""
    whole = make_batch(6, 7, seed=5, num_layers=2, masked=0.5)
    ranks = [rows(whole, 0, 1), rows(whole, 1, 6)]
    reported = []

    def report(statistics: torch.Tensor) -> torch.Tensor:
        reported.append(statistics.clone())
        return statistics

    for rank in ranks:
        losses_of(rank, scope="sequence", reduce_statistics=report)
    total = sum(reported) if reported else None
    losses = [losses_of(rank, scope="sequence", reduce_statistics=lambda _: total.clone()) for rank in ranks]
    sum(loss.aux.sum() / 2 for loss in losses).backward()
    alone = losses_of(whole, scope="sequence")
    alone.aux.sum().backward()
    for layer in range(2):
        mean = sum(loss.aux[layer].item() for loss in losses) / 2
        assert mean == pytest.approx(expected_aux(whole, layer).item(), rel=1e-5)
        gradient = torch.cat([rank[0][layer].grad for rank in ranks])
        torch.testing.assert_close(gradient, whole[0][layer].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_tokens_in_batch", [None, 20])
def test_hidden_sequences_cost_nothing(num_tokens_in_batch):
    logits, indices, mask = make_batch(3, 4, seed=2)
    options = {"scope": "sequence", "num_tokens_in_batch": num_tokens_in_batch}
    mask[1] = False
    losses = losses_of((logits, indices, mask), **options)
    expected = expected_aux((logits, indices, mask), num_tokens_in_batch=num_tokens_in_batch).item()
    assert losses.aux.item() == pytest.approx(expected, rel=1e-5)
    losses.aux.sum().backward()
    assert torch.isfinite(logits[0].grad).all() and not logits[0].grad[4:8].any() and logits[0].grad[:4].any()

    losses = losses_of((logits, indices, torch.zeros_like(mask)), **options)
    assert losses.aux.tolist() == losses.z.tolist() == [0.0]


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tokens_cost_nothing(scope):
    batch = make_batch(2, 0, seed=0, masked=0.0)
    losses = losses_of(batch, scope=scope)
    assert losses.aux.tolist() == losses.z.tolist() == [0.0]
    (losses.aux + losses.z).sum().backward()
    assert batch[0][0].grad.shape == (0, NUM_EXPERTS)


def test_padding_costs_nothing_on_either_side():
    """A sequence padded on the left or on the right, to any length, costs what it costs alone."""
    logits, indices, _ = batch = make_batch(1, 5, seed=4, masked=0.0)
    for left, right in [(0, 3), (3, 0), (1, 2)]:
        padded = torch.cat([random(left, NUM_EXPERTS, seed=8), logits[0].detach(), random(right, NUM_EXPERTS, seed=9)])
        index = torch.cat([torch.zeros(left, 2).long(), indices[0], torch.zeros(right, 2).long()])
        mask = torch.tensor([[False] * left + [True] * 5 + [False] * right])
        aux = losses_of(((padded,), (index,), mask), scope="sequence").aux.item()
        assert aux == pytest.approx(expected_aux(batch).item(), rel=1e-5)
