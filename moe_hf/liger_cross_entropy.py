"""Liger's cross-entropy kernel (Hsu et al. 2024, arXiv 2410.10989), where it is installed and the tensors are on a GPU.

The kernel itself, not `LigerFusedLinearCrossEntropyFunction`, which counts the labels on the host in every forward
pass, compares the loss's gradient with 1 there in every backward pass, and rounds the weight's gradient before scaling.
"""

from collections.abc import Callable
from functools import cache

import torch

# Of the kernel, as version 0.8.5 has them; what another version asks for besides is not known.
_ARGUMENTS = {
    *("X_ptr", "X_stride", "Y_ptr", "Y_stride", "weight_ptr", "loss_ptr", "z_loss_ptr", "loss_stride"),
    *("token_accuracy_ptr", "token_accuracy_stride", "predicted_tokens_ptr", "predicted_tokens_stride"),
    *("n_cols", "n_non_ignore", "sum_non_ignore_weight", "weight_sum", "ignore_index", "lse_square_scale"),
    *("label_smoothing", "reduction", "softcap", "RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY"),
    *("RETURN_PREDICTED_TOKENS", "BLOCK_SIZE", "HAS_WEIGHT", "HAS_SOFTCAPPING", "HAS_GRADIENTS"),
}
_MAX_BLOCK_SIZE = 2**15


@cache
def _kernel() -> Callable | None:
    try:
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    except ImportError:
        return None
    names = getattr(liger_cross_entropy_kernel, "arg_names", ())
    return liger_cross_entropy_kernel if set(names) == _ARGUMENTS else None


def has_fused_losses(logits: torch.Tensor) -> bool:
    """Return whether `fused_losses` can be called with these logits."""
    return logits.is_cuda and logits.dtype != torch.float64 and _kernel() is not None


def fused_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignored_label: int,
    label_smoothing: float,
    z_loss_coef: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every token, `(C,)` float32, and the part of it that is z-loss.

    Nothing is read back to the host.

    Args:
        logits: `(C, V)`, contiguous; with `with_gradient` overwritten by the gradient of the summed losses.
        labels: `(C,)` int64.
        ignored_label: marks tokens without a loss.
        label_smoothing: weight of the uniform distribution in the targets.
        z_loss_coef: weight of the squared logsumexp.
        with_gradient: whether there is to be a gradient.
    """
    num_tokens, vocab_size = logits.shape
    # The kernel leaves out tokens without a loss.
    losses, z_losses = torch.zeros(2, num_tokens, dtype=torch.float32, device=logits.device)
    labels = labels.contiguous()
    _kernel()[(num_tokens,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=labels,
        Y_stride=labels.stride(0),
        weight_ptr=None,
        loss_ptr=losses,
        z_loss_ptr=z_losses,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocab_size,
        n_non_ignore=1,  # of no account in a sum, as the two sums of class weights are
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=ignored_label,
        lse_square_scale=z_loss_coef,
        label_smoothing=label_smoothing,
        reduction="sum",
        softcap=None,
        RETURN_Z_LOSS=True,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=with_gradient,
        BLOCK_SIZE=min(_MAX_BLOCK_SIZE, 1 << (vocab_size - 1).bit_length()),
        num_warps=16 if torch.version.hip else 32,
    )
    return losses, z_losses
