"""The cross-entropy in chunks: equal to the one of all logits, in every dtype, and never with all of them at once."""

import pytest
import torch
import torch.nn.functional as F
from helpers_model import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import moe_hf.linear_cross_entropy
from moe_hf.language_head import LanguageHead

TOKENS, HIDDEN, VOCAB = 37, 16, 50


@pytest.fixture(params=[1, 5, 37, 1000])
def tokens_at_once(request, monkeypatch) -> int:
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "_MAX_LOGITS", request.param * VOCAB)
    return request.param


def case(dtype: torch.dtype = torch.float32) -> tuple[LanguageHead, torch.Tensor, torch.Tensor]:
    """Return a head, hidden states and labels, some of which are ignored."""
    torch.manual_seed(2)
    head = LanguageHead(HIDDEN, VOCAB, bias=False).to(dtype)
    hidden_states = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (TOKENS,)).masked_fill(torch.rand(TOKENS) < 0.3, -100)
    return head, hidden_states, labels


def plainly(
    head: LanguageHead, hidden_states: torch.Tensor, labels: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `factor` times the summed cross-entropy and its gradients, in float64 with all logits."""
    weight, inputs = head.weight.detach().double(), hidden_states.detach().double()
    weight.requires_grad_(), inputs.requires_grad_()
    loss = factor * F.cross_entropy(inputs @ weight.t(), labels, ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.detach(), inputs.grad, weight.grad


@pytest.mark.parametrize("factor", [1.0, 1 / 30])
def test_loss_and_gradients_are_those_of_all_logits(tokens_at_once, factor):
    head, hidden_states, labels = case()
    expected = plainly(head, hidden_states, labels, factor)
    loss = factor * head(hidden_states, labels)
    loss.backward()
    for value, reference in zip((loss, hidden_states.grad, head.weight.grad), expected, strict=True):
        assert (value - reference).norm() <= 1e-6 * reference.norm()


def test_each_token_has_its_own_loss(tokens_at_once):
    head, hidden_states, labels = case()
    expected = F.cross_entropy(head(hidden_states), labels, ignore_index=-100, reduction="none")
    losses = head(hidden_states, labels, reduce=False)
    assert not losses.requires_grad and losses.shape == labels.shape
    assert torch.allclose(losses, expected, rtol=1e-6, atol=0) and not losses[labels == -100].any()


def test_bfloat16_is_rounded_no_more_than_all_logits_are(tokens_at_once):
    head, hidden_states, labels = case(torch.bfloat16)
    expected = plainly(head, hidden_states, labels, 1.0)
    loss = head(hidden_states, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden_states.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    for value, reference in zip((loss, hidden_states.grad, head.weight.grad), expected, strict=True):
        assert (value.double() - reference).norm() <= 6e-3 * reference.norm()


def test_float16_gradients_of_a_mean_over_many_tokens_do_not_vanish():
    """Divided by a million tokens before they are rounded, gradients would be below the smallest 16-bit number."""
    head, hidden_states, labels = case(torch.float16)
    loss_scale, num_tokens = 2.0**16, 1e6
    (head(hidden_states, labels) / num_tokens * loss_scale).backward()
    _, expected, _ = plainly(head, hidden_states, labels, loss_scale / num_tokens)
    assert (hidden_states.grad.double() - expected).norm() <= 1e-2 * expected.norm()


def test_autocast_computes_the_logits_in_its_dtype_and_gives_gradients_of_the_weights():
    head, hidden_states, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden_states, labels)
        logits = head(hidden_states)
    loss.backward()
    expected = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() != pytest.approx(plainly(head, hidden_states, labels, 1.0)[0].item(), rel=1e-7)
    assert head.weight.grad.dtype == hidden_states.grad.dtype == torch.float32


def test_a_frozen_head_passes_the_gradient_on():
    head, hidden_states, labels = case()
    head.weight.requires_grad_(False)
    head(hidden_states, labels).backward()
    assert head.weight.grad is None
    assert torch.allclose(hidden_states.grad, plainly(head, hidden_states, labels, 1.0)[1].float(), atol=1e-6)


def test_nothing_to_predict_has_no_loss():
    head, hidden_states, labels = case()
    loss = head(hidden_states, labels.fill_(-100))
    loss.backward()
    assert loss.item() == 0 and not hidden_states.grad.any() and not head.weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    vocab = 4000
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "_MAX_LOGITS", 16 * vocab)
    largest = {}
    for skips in (True, False):
        for length in (64, 256):
            model = tiny_model(vocab_size=vocab).train()
            ids = torch.randint(vocab, (2, length))
            with LargestTensor() as watch:
                model(ids, labels=ids, skip_logits=skips).loss.backward()
            largest[skips, length] = watch.numel
    assert largest[True, 64] == largest[True, 256] == model.lm_head.weight.numel()
    assert largest[False, 256] >= 2 * 256 * vocab, "with all logits the same watch sees them"


@pytest.mark.parametrize("num_items", [None, 23, torch.tensor(23)])
def test_model_without_logits_has_the_same_loss_and_gradients(num_items):
    torch.manual_seed(0)
    ids = torch.randint(64, (3, 12))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    results = []
    for skips in (False, True):
        model = tiny_model(vocab_size=64, tie_word_embeddings=True).train()
        output = model(ids, labels=labels, skip_logits=skips, num_items_in_batch=num_items)
        output.loss.backward()
        results.append((output, {name: param.grad for name, param in model.named_parameters()}))
    (plain, expected), (output, gradients) = results
    assert output.logits is None and plain.logits is not None and output.sequence_ce_losses is None
    assert output.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert output.ce_loss.item() == pytest.approx(plain.ce_loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("num_items", [None, 23, torch.tensor(23)])
@pytest.mark.parametrize("terms", [{"label_smoothing": 0.2}, {"output_z_loss_coef": 0.03}, {}], ids=str)
def test_smoothed_labels_and_z_loss_with_and_without_logits(num_items, terms):
    """Against the sum over tokens in float64; the router losses come on top of both alike."""
    torch.manual_seed(0)
    terms = terms or {"label_smoothing": 0.2, "output_z_loss_coef": 0.03}
    smoothing, coef = terms.get("label_smoothing", 0.0), terms.get("output_z_loss_coef", 0.0)
    ids = torch.randint(64, (3, 12))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    results = []
    for skips in (False, True):
        model = tiny_model(vocab_size=64, output_z_loss_coef=coef).train()
        settings = {"num_items_in_batch": num_items, "label_smoothing": smoothing, "num_tokens_in_batch": 36.0}
        output = model(ids, labels=labels, skip_logits=skips, **settings)
        output.loss.backward()
        results.append((output, {name: param.grad for name, param in model.named_parameters()}))
    (plain, expected), (output, gradients) = results
    logits, targets = plain.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    ce = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum") / (num_items or 1)
    z_loss = logits.logsumexp(-1)[targets != -100].square().sum() / (num_items or 1)
    if num_items is None:
        ce, z_loss = (value / (targets != -100).sum() for value in (ce, z_loss))
    router = 0.01 * plain.aux_loss + 0.001 * plain.z_loss
    for result in (plain, output):
        assert result.ce_loss.item() == pytest.approx(ce.item(), rel=1e-6)
        assert result.loss.item() == pytest.approx((ce + coef * z_loss + router).item(), rel=1e-6)
        if coef:
            assert result.output_z_loss.item() == pytest.approx(z_loss.item(), rel=1e-6)
        else:
            assert result.output_z_loss is None
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_without_gradients_sequences_have_their_cross_entropies_and_the_loss_has_its_z_loss():
    model, ids = tiny_model(output_z_loss_coef=0.1), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        plain, output = (model(ids, labels=ids, skip_logits=skips) for skips in (False, True))
    for name in ("loss", "ce_loss", "output_z_loss"):
        assert getattr(output, name).item() == pytest.approx(getattr(plain, name).item(), rel=1e-6)
    by_sequence = F.cross_entropy(plain.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(dim=1)
    torch.testing.assert_close(output.sequence_ce_losses, by_sequence)


def test_without_labels_there_is_nothing_to_skip_logits_for():
    assert tiny_model()(torch.tensor([[1, 2]]), skip_logits=True).logits is not None
