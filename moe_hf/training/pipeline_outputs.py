"""What one stage's layers have done, in the place that they have in the whole model.

Shape letters: B sequences of a micro-batch, L sparse layers of the whole model, E experts.
"""

import torch

from ..configuration_moe import MoEConfig
from ..modeling_outputs import MoECausalLMOutput


class WholeModelOutputs:
    """Puts zeros where the layers of other stages belong, so that sums over stages are those of the whole model.

    Args:
        config: of the whole model.
        layers_here: decoder layers of this stage.
    """

    def __init__(self, config: MoEConfig, layers_here: range) -> None:
        self._config = config
        sparse = [index for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        self._places = [place for place, index in enumerate(sparse) if index in layers_here]
        self._num_layers = len(sparse)

    def of(self, outputs: MoECausalLMOutput, batch_size: int, *, statistics: bool, training: bool) -> MoECausalLMOutput:
        """Return the outputs of a stage as those of the whole model, with the same entries on every stage.

        Args:
            outputs: of the stage, for one micro-batch.
            batch_size: B.
            statistics: whether they hold the routers' statistics.
            training: whether they come from a forward pass of training.
        """
        whole = MoECausalLMOutput(loss=outputs.loss, ce_loss=outputs.ce_loss)
        device = outputs.loss.device
        if not torch.is_grad_enabled() or outputs.sequence_ce_losses is not None:
            missing = torch.zeros(batch_size, device=device)
            whole.sequence_ce_losses = missing if outputs.sequence_ce_losses is None else outputs.sequence_ce_losses
        if self._config.output_z_loss_coef:
            _set_or_zero(whole, "output_z_loss", outputs)
        if not self._num_layers:
            return whole
        for name in ("aux_loss", "z_loss"):
            _set_or_zero(whole, name, outputs)
        shapes = {"layer_aux_losses": (), "layer_z_losses": ()}
        shapes["tokens_per_expert"] = (batch_size, self._config.num_experts)
        if statistics:
            shapes |= {"router_entropy": (batch_size,), "router_logit_max": (batch_size,)}
        has_capacity = self._config.expert_capacity_factor is not None
        if training and has_capacity and self._config.router_balancing != "expert_choice":
            shapes["dropped_assignments"] = (batch_size,)
        for name, shape in shapes.items():
            own = getattr(outputs, name)
            full = torch.zeros(self._num_layers, *shape, device=device, dtype=None if own is None else own.dtype)
            if own is not None:
                full[self._places] = own
            setattr(whole, name, full)
        return whole

    def by_layer(self, own: torch.Tensor) -> torch.Tensor:
        """Return `(L, …)` values, of which this stage knows `own`, those of its sparse layers."""
        full = own.new_zeros(self._num_layers, *own.shape[1:])
        full[self._places] = own
        return full


def _set_or_zero(whole: MoECausalLMOutput, name: str, outputs: MoECausalLMOutput) -> None:
    value = getattr(outputs, name)
    setattr(whole, name, torch.zeros((), device=outputs.loss.device) if value is None else value)
