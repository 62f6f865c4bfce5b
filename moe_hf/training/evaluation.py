"""Cross-entropy over tokens, not over batches: what `eval_loss` and its perplexity mean here."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..modeling_moe import MoECausalLMOutput


def sample_statistics(outputs: MoECausalLMOutput, labels: torch.Tensor) -> torch.Tensor:
    """Return `(B, 4)` float32: each sample's summed cross-entropy, its number of predicted tokens, and router losses.

    One row for every sample, so that the duplicates that even out the last batch over ranks can be dropped.
    """
    targets = labels[:, 1:]
    logits = outputs.logits[:, :-1].float()
    ce = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(dim=1)
    router = [loss if loss is not None else ce.new_zeros(()) for loss in (outputs.aux_loss, outputs.z_loss)]
    columns = [ce, targets.ne(-100).sum(dim=1).float(), *(loss.float().expand_as(ce) for loss in router)]
    return torch.stack(columns, dim=1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Reduce the statistics of all samples `(N, 4)` to token-weighted means."""
    ce, num_tokens, aux, z = np.asarray(prediction.predictions, dtype=np.float64).T
    total = num_tokens.sum()
    if total == 0:
        return {"loss": math.nan, "perplexity": math.nan}
    loss = ce.sum() / total
    metrics = {"loss": loss, "perplexity": float(np.exp(loss)), "tokens": int(total)}
    if aux.any() or z.any():
        metrics |= {"aux_loss": (aux * num_tokens).sum() / total, "z_loss": (z * num_tokens).sum() / total}
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
