"""The language-modelling head, which can compute the cross-entropy without ever holding the logits of the whole batch.

Shape letters: B batch, S sequence, T tokens, H hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn

from .linear_cross_entropy import IGNORED_LABEL, LossTerms, losses_besides, summed_losses, token_losses


class LanguageHead(nn.Linear):
    """Linear map from hidden states to logits, or, when it is given labels, to cross-entropies.

    Attributes:
        fused: on a GPU let Liger's kernel compute the cross-entropies, where that package is installed.
    """

    fused = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        reduce: bool = True,
        label_smoothing: float = 0.0,
        z_loss_coef: float = 0.0,
        return_z_loss: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits, `(…, H)` to `(…, V)`; with labels the loss in float32, computed chunk by chunk.

        The loss is computed in here, not beside the module, so that ZeRO-3 has the weight in one piece by then. It can
        go backward once.

        Args:
            hidden_states: `(…, H)`, with labels `(T, H)`.
            labels: `(T,)`, the token that each position is to predict; -100 is ignored.
            reduce: return the sum over the tokens. Otherwise `(T,)` values, without gradients.
            label_smoothing: weight of the uniform distribution in the targets, at least 0 and below 1.
            z_loss_coef: weight of the squared logsumexp of the logits, a part of the loss.
            return_z_loss: return that part, without gradients, beside the loss.
        """
        if labels is None:
            return super().forward(hidden_states)
        terms = LossTerms(label_smoothing, z_loss_coef, self.fused)
        losses = summed_losses if reduce else token_losses
        loss, z_loss = losses(hidden_states, self.weight, labels, terms)
        return (loss, z_loss) if return_z_loss else loss


class PredictionLoss(NamedTuple):
    """Loss of a batch's predictions, a mean over its labels or this micro-batch's share of one.

    Attributes:
        total: the cross-entropy and its z-loss, weighted.
        cross_entropy: with smoothed labels where they are asked for. From chunks and with a z-loss it has no gradient.
        z_loss: mean squared logsumexp of the logits, not weighted; `None` where it has no weight.
        by_sequence: `(B,)` summed cross-entropies, if the loss was computed in chunks and without gradients.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    z_loss: torch.Tensor | None
    by_sequence: torch.Tensor | None = None


def loss_in_chunks(
    head: LanguageHead,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> PredictionLoss:
    """Return the loss without the logits of the whole batch.

    Args:
        head: computes it.
        hidden_states: `(B, S, H)`.
        targets: `(B, S)`, the token that each position is to predict; -100 is ignored.
        num_items_in_batch: what the sum over the labels is divided by; their number when not given.
        label_smoothing: weight of the uniform distribution in the targets.
        z_loss_coef: weight of the z-loss.
    """
    targets = targets.to(hidden_states.device)
    with_gradients = torch.is_grad_enabled()
    total, z_part = head(
        hidden_states.flatten(0, 1),
        targets.flatten(),
        reduce=with_gradients,
        label_smoothing=label_smoothing,
        z_loss_coef=z_loss_coef,
        return_z_loss=True,
    )
    by_sequence = None
    if not with_gradients:
        by_sequence = (total - z_part).view_as(targets).sum(dim=1)
        total, z_part = total.sum(), z_part.sum()
    num_items = _num_items(num_items_in_batch, targets)
    total = total / num_items
    if not z_loss_coef:
        return PredictionLoss(total, total.clone(), None, by_sequence)
    z_part = z_part / num_items
    return PredictionLoss(total, total.detach() - z_part, z_part / z_loss_coef, by_sequence)


def loss_of_logits(
    cross_entropy: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> PredictionLoss:
    """Add to the plain mean cross-entropy of whole logits what label smoothing and the z-loss add.

    Args:
        cross_entropy: of the logits, divided as the result.
        logits: `(B, S, V)`.
        targets: as for `loss_in_chunks`, as everything below.
        num_items_in_batch: see there.
        label_smoothing: see there.
        z_loss_coef: see there.
    """
    if not (label_smoothing or z_loss_coef):
        # Not the same tensor: Trainer scales the loss in place.
        return PredictionLoss(cross_entropy, cross_entropy.clone(), None)
    targets = targets.to(logits.device)
    num_items = _num_items(num_items_in_batch, targets)
    smoothing, z_part = (
        part / num_items for part in losses_besides(logits, targets, LossTerms(label_smoothing, z_loss_coef))
    )
    cross_entropy = cross_entropy + smoothing
    return PredictionLoss(cross_entropy + z_part, cross_entropy, z_part / z_loss_coef if z_loss_coef else None)


def _num_items(given: torch.Tensor | float | None, targets: torch.Tensor) -> torch.Tensor | float:
    if given is None:
        return (targets != IGNORED_LABEL).sum()
    return given.to(targets.device) if torch.is_tensor(given) else given
