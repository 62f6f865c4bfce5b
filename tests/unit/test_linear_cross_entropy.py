"""The loss in chunks: cross-entropy, label smoothing and z-loss from their formulas, and the memory that they take."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from transformers.trainer_pt_utils import LabelSmoother

import moe_hf.linear_cross_entropy
from moe_hf.linear_cross_entropy import LossTerms, losses_besides, summed_losses, token_losses

TOKENS, HIDDEN, VOCAB = 37, 16, 50
TERMS = [LossTerms(), LossTerms(0.1), LossTerms(0.0, 1e-2), LossTerms(0.3, 1e-2)]


@pytest.fixture(params=[(1, 1), (5, 2), (1000, 4), (1000, 1000)], ids="{0[0]} tokens, {0[1]} together".format)
def tokens_at_once(request, monkeypatch) -> None:
    for name, tokens in zip(("_MAX_LOGITS", "_MAX_PROBABILITIES_ON_CPU"), request.param, strict=True):
        monkeypatch.setattr(moe_hf.linear_cross_entropy, name, tokens * VOCAB)


def case(dtype: torch.dtype = torch.float32, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, weight and labels, some of which are ignored."""
    torch.manual_seed(2)
    hidden_states = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = (spread * torch.randn(VOCAB, HIDDEN)).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,)).masked_fill(torch.rand(TOKENS) < 0.3, -100)
    return hidden_states, weight, labels


def formula(hidden_states, weight, labels, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(T,)` losses and the z-losses in them, in float64, from whole distributions of targets."""
    logits = hidden_states.double() @ weight.double().t()
    log_probabilities, counted = logits.log_softmax(-1), (labels != -100).double()
    targets = (1 - terms.label_smoothing) * F.one_hot(labels.clamp(min=0), VOCAB) + terms.label_smoothing / VOCAB
    z_losses = terms.z_loss_coef * counted * logits.exp().sum(-1).log() ** 2
    return -(targets * log_probabilities).sum(-1) * counted + z_losses, z_losses


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_loss_and_gradients_are_those_of_the_formula(tokens_at_once, terms):
    hidden_states, weight, labels = case()
    loss, z_loss = summed_losses(hidden_states, weight, labels, terms)
    (loss / 30).backward()
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    losses, z_losses = formula(*inputs, labels, terms)
    (losses.sum() / 30).backward()
    assert loss.dtype == torch.float32 and not z_loss.requires_grad
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert z_loss.item() == pytest.approx(z_losses.sum().item(), rel=1e-6, abs=0.0)
    for tensor, reference in zip((hidden_states, weight), inputs, strict=True):
        assert distance(tensor.grad, reference.grad) <= 1e-6


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_each_token_has_its_own_loss(tokens_at_once, terms):
    hidden_states, weight, labels = case()
    losses, z_losses = token_losses(hidden_states, weight, labels, terms)
    expected, expected_z = formula(hidden_states, weight, labels, terms)
    assert not losses.requires_grad and not losses[labels == -100].any()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z_losses.double(), expected_z.detach(), rtol=1e-6, atol=0.0)


def test_derivative_in_float64():
    hidden_states, weight, labels = case(torch.float64)
    inputs = [tensor.detach() for tensor in (hidden_states, weight)]
    hidden_states, weight = (tensor.requires_grad_() for tensor in inputs)
    loss, _ = summed_losses(hidden_states, weight, labels, LossTerms(0.2, 0.05))
    loss.backward()
    for tensor, place in ((hidden_states, (3, 4)), (weight, (7, 2)), (weight, (int(labels.max()), 0))):
        values = []
        for step in (1e-5, -1e-5):
            moved = [one.detach().clone() for one in inputs]
            moved[0 if tensor is hidden_states else 1][place] += step
            values.append(formula(*moved, labels, LossTerms(0.2, 0.05))[0].sum().item())
        assert tensor.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_logits_far_apart_are_exact():
    """Probabilities of most labels are 0 in float32 here, and some are 1."""
    hidden_states, weight, labels = case(spread=30.0)
    terms = LossTerms(0.1, 1e-4)
    losses, _ = token_losses(hidden_states, weight, labels, terms)
    expected, _ = formula(hidden_states, weight, labels, terms)
    assert expected.max() > 200 and torch.isfinite(losses).all()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_is_that_of_torch_and_of_transformers(smoothing):
    hidden_states, weight, labels = case()
    loss, _ = summed_losses(hidden_states, weight, labels, LossTerms(smoothing))
    logits, count = hidden_states @ weight.t(), (labels != -100).sum()
    torchs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    transformers = LabelSmoother(smoothing)({"logits": logits[None]}, labels[None])
    assert (loss / count).item() == pytest.approx(torchs.item(), rel=1e-6)
    assert (loss / count).item() == pytest.approx(transformers.item(), rel=1e-6)


@pytest.mark.parametrize("terms", TERMS[1:], ids=str)
def test_what_whole_logits_add_to_the_plain_cross_entropy(terms):
    hidden_states, weight, labels = case()
    logits = hidden_states @ weight.t()
    plain = F.cross_entropy(logits, labels, reduction="sum")
    smoothing, z_loss = losses_besides(logits, labels, terms)
    (plain + smoothing + z_loss).backward()
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    losses, z_losses = formula(*inputs, labels, terms)
    losses.sum().backward()
    assert (plain + smoothing + z_loss).item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert z_loss.item() == pytest.approx(z_losses.sum().item(), rel=1e-6)
    for tensor, reference in zip((hidden_states, weight), inputs, strict=True):
        assert distance(tensor.grad, reference.grad) <= 1e-6


def test_gradients_are_given_away_once():
    hidden_states, weight, labels = case()
    loss, _ = summed_losses(hidden_states, weight, labels, LossTerms())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away"):
        loss.backward()


# --------------------------------------------------------------------------------------------------------------------
# Memory


def peak(num_tokens: int, vocab_size: int, dtype: torch.dtype, hidden_size: int) -> int:
    """Return the bytes that exist at the fullest moment of the loss and its gradients, hidden states and all."""
    with LiveBytes() as live:
        hidden_states = torch.randn(num_tokens, hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.randn(vocab_size, hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.randint(vocab_size, (num_tokens,))
        loss, _ = summed_losses(hidden_states, weight, labels, LossTerms(0.1, 1e-4))
        (loss / num_tokens).backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_the_gradients_and_of_one_chunk(monkeypatch, dtype):
    """Four times the tokens, or four times the vocabulary, or both: the logits take no more."""
    budget, hidden_size, size = 2**16, 8, torch.finfo(dtype).bits // 8
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "_MAX_LOGITS", budget)
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "_MAX_PROBABILITIES_ON_CPU", budget // 4)
    for num_tokens, vocab_size in ((256, 1024), (1024, 1024), (256, 4096), (1024, 4096)):
        # A quarter's probabilities in float32 beside the logits, and what is known of each token of the chunk.
        chunk = (1 + size) * budget + 100 * (budget // vocab_size)
        of_tokens = num_tokens * (2 * size * hidden_size + 8)
        # In 16 bits the sum is kept in float32, and rounded at last.
        of_weight = (2 * size + (4 if size < 4 else 0)) * vocab_size * hidden_size
        assert peak(num_tokens, vocab_size, dtype, hidden_size) <= chunk + of_tokens + of_weight
    assert chunk + of_tokens + of_weight < size * num_tokens * vocab_size / 4, "all logits would be seen"


def test_backward_pass_makes_no_second_gradient_of_the_weight(monkeypatch):
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "_MAX_LOGITS", 2**10)
    num_tokens, vocab_size, hidden_size = 16, 1024, 64
    of_weight = 2 * 4 * vocab_size * hidden_size
    assert peak(num_tokens, vocab_size, torch.float32, hidden_size) <= 1.1 * of_weight
