"""The loss by Liger's kernel: found where it is the one that is known, called for what our own chunks compute."""

import liger_twin
import pytest
import torch

import moe_hf.linear_cross_entropy
from moe_hf import liger_cross_entropy
from moe_hf.language_head import LanguageHead
from moe_hf.linear_cross_entropy import LossTerms, summed_losses, token_losses

TOKENS, HIDDEN, VOCAB = 23, 16, 70


@pytest.fixture
def kernel(monkeypatch) -> liger_twin.CrossEntropyKernel:
    """Liger is installed, and takes the tensors of this machine for those of a GPU."""
    kernel = liger_twin.CrossEntropyKernel()
    liger_twin.install(monkeypatch, ops__cross_entropy={"liger_cross_entropy_kernel": kernel})
    liger_cross_entropy._kernel.cache_clear()
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "has_fused_losses", lambda logits: True)
    monkeypatch.setattr(moe_hf.linear_cross_entropy, "_MAX_LOGITS", 5 * VOCAB)
    yield kernel
    liger_cross_entropy._kernel.cache_clear()


def results(dtype: torch.dtype, terms: LossTerms) -> list[torch.Tensor]:
    """Return losses and gradients of the sum, and losses of tokens."""
    torch.manual_seed(3)
    hidden_states = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,)).masked_fill(torch.rand(TOKENS) < 0.3, -100)
    loss, z_loss = summed_losses(hidden_states, weight, labels, terms)
    (loss / 7).backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == dtype
    return [loss.detach(), z_loss, hidden_states.grad, weight.grad, *token_losses(hidden_states, weight, labels, terms)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2)])
def test_it_computes_what_our_own_chunks_do(kernel, dtype, terms):
    fused, own = (results(dtype, LossTerms(*terms, fused=fused)) for fused in (True, False))
    assert kernel.num_launches == 2 * 5, "five chunks with gradients, five without"
    for value, expected in zip(fused, own, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2 if value.dtype == torch.bfloat16 else 1e-5, atol=2e-5)


def test_a_head_may_be_told_to_leave_it(kernel):
    head = LanguageHead(HIDDEN, VOCAB, bias=False)
    labels = torch.randint(VOCAB, (4,))
    head(torch.randn(4, HIDDEN), labels)
    assert kernel.num_launches == 1
    head.fused = False
    head(torch.randn(4, HIDDEN), labels)
    assert kernel.num_launches == 1


@pytest.mark.parametrize("others", [["X_ptr"], [*liger_twin.CrossEntropyKernel.arg_names, "TEMPERATURE"]])
def test_a_kernel_with_other_arguments_is_not_called(kernel, others):
    assert liger_cross_entropy._kernel() is kernel
    liger_cross_entropy._kernel.cache_clear()
    kernel.arg_names = others
    assert liger_cross_entropy._kernel() is None


def test_without_liger_or_a_gpu_there_is_none(monkeypatch):
    assert not liger_cross_entropy.has_fused_losses(torch.zeros(2, 3))
    liger_twin.install(monkeypatch)
    liger_cross_entropy._kernel.cache_clear()
    assert liger_cross_entropy._kernel() is None
    liger_cross_entropy._kernel.cache_clear()
