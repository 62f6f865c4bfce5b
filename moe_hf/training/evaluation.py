"""Cross-entropy over tokens, not over batches, and the experts' loads: what an evaluation reports.

Shape letters: B sequences of a batch, N of an evaluation's step over all ranks, L sparse layers, E experts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from transformers import EvalPrediction

from ..configuration_moe import MoEConfig
from ..modeling_outputs import MoECausalLMOutput
from .telemetry.balance import balance_of, load_shares
from .telemetry.loads import LatestLoads

if TYPE_CHECKING:
    from ..parallel.ulysses import UlyssesSequence

# Summed cross-entropy, number of predicted tokens, balancing loss, z-loss.
_NUM_LOSS_COLUMNS = 4


def sample_statistics(
    outputs: MoECausalLMOutput,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what is known of each sample, `(B, 4)` float32, or `(B, 5 + 2 * L + L * E)` where there are routers.

    The outputs are those of a forward pass with labels and `skip_logits`, without gradients. Where samples are pieces
    of sequences, `shift_labels` are the tokens they are to predict.

    One row for every sample, so that the duplicates that even out the last batch over ranks can be dropped: summed
    cross-entropy, number of predicted tokens, balancing loss and z-loss of its batch; then the number of unmasked
    tokens, their summed entropy and largest logit in each layer, and its assignments, whole numbers that float32 holds
    exactly.
    """
    targets, ce = labels[:, 1:] if shift_labels is None else shift_labels, outputs.sequence_ce_losses
    router = [loss if loss is not None else ce.new_zeros(()) for loss in (outputs.aux_loss, outputs.z_loss)]
    columns = [ce, targets.ne(-100).sum(dim=1).float(), *(loss.float().expand_as(ce) for loss in router)]
    statistics = torch.stack(columns, dim=1)
    if outputs.tokens_per_expert is None:
        return statistics
    num_tokens = torch.ones_like(labels) if attention_mask is None else attention_mask
    by_layer = [outputs.router_entropy.t(), outputs.router_logit_max.t()]
    loads = outputs.tokens_per_expert.transpose(0, 1).flatten(start_dim=1)
    routing = [num_tokens.sum(dim=1, keepdim=True), *by_layer, loads]
    return torch.cat([statistics, *(columns.to(statistics) for columns in routing)], dim=1)


@contextmanager
def gather_once(accelerator: Accelerator, num_copies: int) -> Iterator[None]:
    """Let `accelerator` gather the rows of a batch once, where `num_copies` ranks in a row have read the same."""
    if num_copies == 1:
        yield
        return

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        gathered = type(accelerator).gather(accelerator, tensor)
        return gathered.unflatten(0, (-1, num_copies, len(tensor)))[:, 0].flatten(0, 1)

    accelerator.gather = gather
    try:
        yield
    finally:
        del accelerator.gather


def join_pieces(statistics: torch.Tensor, shared: "UlyssesSequence", num_layers: int) -> torch.Tensor:
    """Return the `sample_statistics` of whole sequences from those of their pieces (a collective call).

    Args:
        statistics: of this rank's pieces; their losses are shares that add up.
        shared: the ranks with the other pieces.
        num_layers: sparse layers.
    """
    joined, largest = shared.sum(statistics), shared.max(statistics)
    logits = slice(_NUM_LOSS_COLUMNS + 1 + num_layers, _NUM_LOSS_COLUMNS + 1 + 2 * num_layers)
    joined[:, logits] = largest[:, logits]
    return joined


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
        self._num_routed = 0.0
        self._entropies = np.zeros(len(self._layers))
        self._logit_max = np.zeros(len(self._layers))
        self._counts = np.zeros((len(self._layers), self._num_experts if self._layers else 0))

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add the rows of one step, N of them.

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
        if rows.shape[1] > _NUM_LOSS_COLUMNS:
            self._add_routing(rows[:, _NUM_LOSS_COLUMNS:].astype(np.float64))
        return self._result() if compute_result else {}

    def _add_routing(self, rows: np.ndarray) -> None:
        num_layers = len(self._layers)
        num_tokens, entropies, logits, counts = np.split(rows, [1, 1 + num_layers, 1 + 2 * num_layers], axis=1)
        self._num_routed += num_tokens.sum()
        self._entropies += entropies.sum(axis=0)
        self._logit_max = np.maximum(self._logit_max, logits.max(axis=0))
        self._counts += counts.sum(axis=0).reshape(self._counts.shape)

    def _result(self) -> dict[str, float]:
        metrics = self._losses()
        self._loads.eval = None
        if self._num_routed:
            metrics |= self._balance(self._counts) | self._distributions()
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

    def _distributions(self) -> dict[str, float]:
        # A single expert has no distribution to speak of: as balanced as can be.
        largest = self._num_routed * math.log(self._num_experts)
        entropies = self._entropies / largest if largest else np.ones_like(self._entropies)
        metrics = {f"router_entropy/{layer}": float(e) for layer, e in zip(self._layers, entropies, strict=True)}
        return metrics | {
            f"router_logit_max/{layer}": float(logit)
            for layer, logit in zip(self._layers, self._logit_max, strict=True)
        }

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
