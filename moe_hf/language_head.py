"""The language-modelling head, which can compute the cross-entropy without ever holding the logits of the whole batch.

Shape letters: T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

IGNORED_LABEL = -100

# Logits that exist at one time, 128 MiB of them in float32: some hundreds of tokens with a vocabulary of 50 thousand.
_MAX_LOGITS = 2**25


class LanguageHead(nn.Linear):
    """Linear map from hidden states to logits, or, when it is given labels, to cross-entropies."""

    def forward(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, *, reduce: bool = True
    ) -> torch.Tensor:
        """Return logits, `(…, H)` to `(…, V)`; with labels the cross-entropy in float32, computed chunk by chunk.

        The loss is computed in here, not beside the module, so that ZeRO-3 has the weight in one piece by then.

        Args:
            hidden_states: `(…, H)`, with labels `(T, H)`.
            labels: `(T,)`, the token that each position is to predict; -100 is ignored.
            reduce: return the sum over the tokens. Otherwise `(T,)` values, without gradients.
        """
        if labels is None:
            return super().forward(hidden_states)
        weight = self.weight
        if reduce:
            return _SummedCrossEntropy.apply(hidden_states, weight, labels)
        with torch.no_grad():
            parts = [
                _losses(_log_probabilities(hidden_states[rows], weight), labels[rows])
                for rows in _chunks(weight, labels)
            ]
        return torch.cat(parts)


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, as long as a chunk's probabilities are there.

    They are those of the sum, which neither the number of tokens nor a loss scale has made small: 16 bits hold them.
    """

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=hidden_states.device)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden_states) if for_hidden else None
        # Summed over chunks in float32, whatever the weight is.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        for rows in _chunks(weight, labels):
            log_probabilities = _log_probabilities(hidden_states[rows], weight)
            total += _losses(log_probabilities, labels[rows]).sum()
            gradient = _gradient_of_logits(log_probabilities, labels[rows]).to(hidden_states.dtype)
            if for_hidden:
                hidden_gradient[rows] = gradient @ weight
            if for_weight:
                weight_gradient += gradient.t() @ hidden_states[rows]
            del log_probabilities, gradient  # or they would live on beside those of the next chunk
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * factor
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * factor).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None


def _chunks(weight: torch.Tensor, labels: torch.Tensor) -> Iterator[slice]:
    size = max(1, _MAX_LOGITS // len(weight))
    return (slice(start, start + size) for start in range(0, len(labels), size))


def _log_probabilities(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_states, weight).float().log_softmax(dim=-1)


def _losses(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(log_probabilities, labels, ignore_index=IGNORED_LABEL, reduction="none")


def _gradient_of_logits(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Turn log-probabilities, in place, into the gradient by the logits: softmax minus one-hot."""
    ignored = labels == IGNORED_LABEL
    target = labels.masked_fill(ignored, 0).unsqueeze(-1)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
    return gradient.masked_fill_(ignored.unsqueeze(-1), 0.0)
