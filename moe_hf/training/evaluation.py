"""Cross-entropy over tokens, not over batches, and the experts' loads: what an evaluation reports.

Shape letters: B sequences of a batch, N of an evaluation's step over all ranks, L sparse layers, E experts.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..configuration_moe import MoEConfig
from ..modeling_moe import MoECausalLMOutput
from .telemetry.balance import balance_of, load_shares
from .telemetry.loads import LatestLoads

# Columns before those of the loads: summed cross-entropy, number of predicted tokens, balancing loss, z-loss.
_NUM_LOSS_COLUMNS = 4


def sample_statistics(outputs: MoECausalLMOutput, labels: torch.Tensor) -> torch.Tensor:
    """Return `(B, 4 + L * E)` float32: each sample's cross-entropy, predicted tokens, router losses and assignments.

    One row for every sample, so that the duplicates that even out the last batch over ranks can be dropped. The router
    losses are those of the batch; the assignments of a sample are whole numbers that float32 holds exactly.
    """
    targets = labels[:, 1:]
    logits = outputs.logits[:, :-1].float()
    ce = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(dim=1)
    router = [loss if loss is not None else ce.new_zeros(()) for loss in (outputs.aux_loss, outputs.z_loss)]
    columns = [ce, targets.ne(-100).sum(dim=1).float(), *(loss.float().expand_as(ce) for loss in router)]
    statistics = torch.stack(columns, dim=1)
    if outputs.tokens_per_expert is None:
        return statistics
    loads = outputs.tokens_per_expert.transpose(0, 1).flatten(start_dim=1)
    return torch.cat([statistics, loads.to(statistics)], dim=1)


class EvaluationMetrics:
    """Adds up `sample_statistics` of an evaluation, step by step, in float64 on the host.

    Memory does not grow with the number of samples. To be given to `Trainer` as `compute_metrics`, with
    `batch_eval_metrics`; called once with the rows of all samples it gives the same.

    Args:
        config: of the model.
        loads: is given the experts' loads of every evaluation.
    """

    def __init__(self, config: MoEConfig, loads: LatestLoads) -> None:
        self._layers = [f"layer_{i}" for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        self._num_experts = config.num_experts
        self._loads = loads
        self.reset()

    def reset(self) -> None:
        """Forget what an evaluation that did not come to its end has left."""
        self._ce = self._num_tokens = 0.0
        self._router_losses = np.zeros(2)
        self._counts: np.ndarray | None = None

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add the rows `(N, 4 + L * E)` of one step.

        Args:
            prediction: with the rows as `predictions`, of all ranks, on any device.
            compute_result: whether these were the last of the evaluation.

        Returns:
            Token-weighted means of the losses over all rows since the last result, and how balanced the experts were;
            nothing before the last step.
        """
        rows = prediction.predictions
        rows = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
        ce, num_tokens, *router_losses = rows[:, :_NUM_LOSS_COLUMNS].astype(np.float64).T
        self._ce += ce.sum()
        self._num_tokens += num_tokens.sum()
        self._router_losses += [(loss * num_tokens).sum() for loss in router_losses]
        counts = rows[:, _NUM_LOSS_COLUMNS:].sum(axis=0, dtype=np.float64)
        self._counts = counts if self._counts is None else self._counts + counts
        return self._result() if compute_result else {}

    def _result(self) -> dict[str, float]:
        metrics = self._losses()
        self._loads.eval = None
        if self._counts.size:
            metrics |= self._balance(self._counts.reshape(len(self._layers), self._num_experts))
        self.reset()
        return metrics

    def _losses(self) -> dict[str, float]:
        if self._num_tokens == 0:
            return {"loss": math.nan, "perplexity": math.nan}
        loss = self._ce / self._num_tokens
        with np.errstate(over="ignore"):  # a hopeless model is no reason to warn of arithmetic
            metrics = {"loss": float(loss), "perplexity": float(np.exp(loss)), "tokens": int(self._num_tokens)}
        if self._router_losses.any():
            means = (self._router_losses / self._num_tokens).tolist()
            metrics |= dict(zip(("aux_loss", "z_loss"), means, strict=True))
        return metrics

    def _balance(self, counts: np.ndarray) -> dict[str, float]:
        metrics, balance, dead = {}, balance_of(counts), (counts == 0).sum(axis=-1)
        for name, values in balance._asdict().items():
            metrics |= {f"{name}/{layer}": float(value) for layer, value in zip(self._layers, values, strict=True)}
        metrics |= {f"dead_experts/{layer}": int(number) for layer, number in zip(self._layers, dead, strict=True)}
        self._loads.eval = dict(zip(self._layers, load_shares(counts).tolist(), strict=True))
        return metrics | {
            "max_vio": float(balance.max_vio.mean()),
            "load_entropy": float(balance.load_entropy.mean()),
            "dead_experts": int(dead.sum()),
        }
