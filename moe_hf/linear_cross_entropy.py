"""A linear map and the cross-entropy of its outputs, chunk by chunk, so that all logits are never there at once.

Shape letters: T tokens, C tokens of a chunk, H hidden size, V vocabulary.

With label smoothing e the target is 1 - e for the label and e / V for every token (Szegedy et al. 2015,
arXiv 1512.00567, section 7). The z-loss adds `z_loss_coef * logsumexp(logits) ** 2`, which keeps the logits from
drifting (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .liger_cross_entropy import fused_losses, has_fused_losses

IGNORED_LABEL = -100

# Logits that exist at one time, 128 MiB of them in float32: some hundreds of tokens with a vocabulary of 50 thousand.
_MAX_LOGITS = 2**25
# Of these, whose probabilities in float32 are there at one time on a CPU: 2 MiB, which its caches hold.
_MAX_PROBABILITIES_ON_CPU = 2**19
# What matrix products on GPUs like the number of tokens to be a multiple of.
_TILE = 64


@dataclass(frozen=True)
class LossTerms:
    """What is computed besides the plain cross-entropy, and by what.

    Attributes:
        label_smoothing: e above, at least 0 and below 1.
        z_loss_coef: weight of the z-loss.
        fused: let Liger's kernel compute a chunk where it can.
    """

    label_smoothing: float = 0.0
    z_loss_coef: float = 0.0
    fused: bool = True


def summed_losses(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss summed over the tokens, and the part of it that is z-loss, which has no gradient; both float32.

    Gradients are computed together with the loss and given away by the backward pass, of which there can be one.

    Args:
        hidden_states: `(T, H)`.
        weight: `(V, H)`.
        labels: `(T,)`; -100 is ignored.
        terms: of the loss.
    """
    return _SummedLosses.apply(hidden_states, weight, labels, terms)


@torch.no_grad()
def token_losses(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `summed_losses`, with `(T,)` values instead of sums, and without gradients."""
    chunks = _Chunks(hidden_states, weight, labels, terms)
    losses, z_losses = zip(*(chunk[:2] for chunk in chunks.losses(with_gradient=False)), strict=True)
    return torch.cat(losses), torch.cat(z_losses)


def losses_besides(logits: torch.Tensor, labels: torch.Tensor, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what comes to the plain cross-entropy of whole logits, summed: by label smoothing, and as z-loss.

    Args:
        logits: `(…, V)`.
        labels: `(…)`, the token that each position is to predict; -100 is ignored.
        terms: of the loss.
    """
    logits, valid = logits.float(), labels != IGNORED_LABEL
    of_label = logits.gather(-1, labels.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    # (1 - e) (lse - x_y) + e (lse - mean x), without its plain part lse - x_y.
    smoothing = terms.label_smoothing * (of_label - logits.mean(dim=-1))
    z_losses = terms.z_loss_coef * logits.logsumexp(dim=-1).square()
    return smoothing.masked_fill(~valid, 0.0).sum(), z_losses.masked_fill(~valid, 0.0).sum()


class _SummedLosses(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, as long as a chunk's probabilities are there.

    They are those of the sum, which neither the number of tokens nor a loss scale has made small: 16 bits hold them.
    """

    @staticmethod
    def forward(
        ctx, hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, terms: LossTerms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = _Chunks(hidden_states, weight, labels, terms)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden_states) if for_hidden else None
        # Summed over chunks in float32, whatever the weight is.
        weight_gradient = torch.zeros_like(weight, dtype=chunks.precise) if for_weight else None
        total, z_total = (torch.zeros((), device=weight.device, dtype=chunks.precise) for _ in range(2))
        for rows, (losses, z_losses, gradient) in zip(chunks.rows(), chunks.losses(with_gradient=True), strict=True):
            total += losses.sum()
            z_total += z_losses.sum()
            with torch.autocast(weight.device.type, enabled=False):
                if for_hidden:
                    hidden_gradient[rows] = gradient @ chunks.weight
                if for_weight:
                    _add_product(weight_gradient, gradient.t(), chunks.hidden_states(rows))
            del gradient  # or it would live on beside the next chunk's
        # Not as saved tensors: the backward pass changes them in place.
        ctx.gradients, ctx.weight_dtype = (hidden_gradient, weight_gradient), weight.dtype
        ctx.mark_non_differentiable(z_total)
        return total, z_total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor: torch.Tensor, _) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of a loss that is computed in chunks are given away by its first backward pass; "
                "compute the loss again, or from whole logits."
            )
        (hidden_gradient, weight_gradient), ctx.gradients = ctx.gradients, None
        if hidden_gradient is not None:
            hidden_gradient.mul_(factor)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(factor).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None


class _Chunks:
    """The tokens of a batch in pieces whose logits are computed in the same memory one after the other.

    Attributes:
        weight: in the dtype that is computed in.
        precise: dtype of losses and sums.
    """

    def __init__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, terms: LossTerms
    ) -> None:
        device = hidden_states.device.type
        computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.weight, self.precise = weight.to(computed_in), torch.promote_types(weight.dtype, torch.float32)
        self._hidden_states, self._labels, self._terms = hidden_states, labels, terms
        self._size = min(len(labels), _chunk_size(len(weight)))

    def rows(self) -> Iterator[slice]:
        """Yield which tokens each chunk has; one chunk without tokens if there are none."""
        return (slice(start, start + self._size) for start in range(0, max(1, len(self._labels)), max(1, self._size)))

    def hidden_states(self, rows: slice) -> torch.Tensor:
        """Return `(C, H)` in the dtype that is computed in."""
        return self._hidden_states[rows].to(self.weight.dtype)

    def losses(self, *, with_gradient: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield of each chunk `(C,)` losses, the z-losses in them, and the gradient by the logits `(C, V)`.

        The gradient is overwritten by the next chunk.
        """
        logits = self.weight.new_empty(self._size, len(self.weight))
        fused = self._terms.fused and has_fused_losses(logits)
        probabilities = None if fused else logits.new_empty(_block_size(logits), len(self.weight), dtype=self.precise)
        for rows in self.rows():
            hidden_states, labels = self.hidden_states(rows), self._labels[rows]
            of_chunk = logits[: len(labels)]
            with torch.autocast(logits.device.type, enabled=False):
                torch.mm(hidden_states, self.weight.t(), out=of_chunk)
            if fused:
                smoothing, z_loss_coef = self._terms.label_smoothing, self._terms.z_loss_coef
                yield *fused_losses(of_chunk, labels, IGNORED_LABEL, smoothing, z_loss_coef, with_gradient), of_chunk
            else:
                yield *self._by_blocks(of_chunk, labels, probabilities, with_gradient), of_chunk

    def _by_blocks(
        self, logits: torch.Tensor, labels: torch.Tensor, probabilities: torch.Tensor, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and z-losses of a chunk; `probabilities` is memory for those of a block of its tokens."""
        losses, z_losses = [], []
        for block, of_block in zip(logits.split(len(probabilities)), labels.split(len(probabilities)), strict=True):
            found = _losses(block, of_block, self._terms, probabilities[: len(block)], with_gradient)
            losses.append(found[0])
            z_losses.append(found[1])
        return torch.cat(losses), torch.cat(z_losses)


def _chunk_size(vocab_size: int) -> int:
    size = max(1, _MAX_LOGITS // vocab_size)
    return size - size % _TILE if size > _TILE else size


def _block_size(logits: torch.Tensor) -> int:
    """Return of how many tokens at one time the probabilities are computed, of a chunk's `(C, V)` logits."""
    tokens, vocab_size = logits.shape
    if logits.device.type == "cpu":
        tokens = min(tokens, _MAX_PROBABILITIES_ON_CPU // vocab_size)
    return max(1, tokens)


def _losses(
    logits: torch.Tensor, labels: torch.Tensor, terms: LossTerms, probabilities: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(T,)` losses and z-losses, and write the gradient into the logits if it is wanted.

    `probabilities` is memory for them, in the dtype of the losses.
    """
    precise = probabilities.dtype
    torch.softmax(logits, dim=-1, dtype=precise, out=probabilities)
    valid = labels != IGNORED_LABEL
    target = labels.masked_fill(~valid, 0).unsqueeze(-1)
    # From the largest logit and its probability, at least 1 / V: cheaper than a log-softmax, from which the
    # probabilities would be computed again, and as exact, also where the label's own probability vanishes.
    largest = logits.amax(dim=-1).to(precise)
    log_sum = -probabilities.amax(dim=-1).log()
    losses = largest - logits.gather(-1, target).squeeze(-1).to(precise)
    if smoothing := terms.label_smoothing:
        mean = logits.mean(dim=-1, dtype=precise)
        losses = (1 - smoothing) * losses + smoothing * (largest - mean)
    logsumexp = largest + log_sum
    z_losses = (terms.z_loss_coef * logsumexp.square()).masked_fill(~valid, 0.0)
    losses = (losses + log_sum).masked_fill(~valid, 0.0) + z_losses
    if not with_gradient:
        return losses, z_losses
    counted = valid.to(precise).unsqueeze(-1)
    gradient = probabilities.mul_(counted * (1 + 2 * terms.z_loss_coef * logsumexp.unsqueeze(-1)))
    if smoothing:
        gradient.sub_(counted * (smoothing / logits.shape[-1]))
    gradient.scatter_add_(1, target, counted * (smoothing - 1))
    logits.copy_(gradient)
    return losses, z_losses


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total`, in the precision of `total` where a device can."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(left.device) >= (8, 0):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
