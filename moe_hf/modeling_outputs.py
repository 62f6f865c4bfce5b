"""What the model classes return: the outputs of Transformers with what the routers have done."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class MoEModelOutput(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast` with what each sparse layer's router has chosen.

    `router_indices` are the `(T, K)` experts; with `router_balancing="expert_choice"` `(T, E)`, where `num_experts`
    stands for none. `router_drops` are `(T, K)` bool, `True` where the expert had no room, or `None` without capacity.
    """

    router_indices: tuple[torch.LongTensor, ...] | None = None
    router_drops: tuple[torch.BoolTensor | None, ...] | None = None


@dataclass
class MoECausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of `MoEForCausalLM`; `loss` is the sum of its parts.

    They are `ce_loss`, `output_z_loss_coef * output_z_loss`, `router_aux_loss_coef * aux_loss` and
    `router_z_loss_coef * z_loss`.
    `ce_loss` is of smoothed labels where `label_smoothing` was given; `output_z_loss` is `None` if its weight is 0.
    With `skip_logits`, a loss that has both has gradients only as their weighted sum.
    Where no balancing loss is asked for, the loss has no part of `aux_loss`, which then only tells of the balance of
    one rank's tokens.
    `aux_loss` and `z_loss` are the sums of the per-layer `layer_aux_losses` and `layer_z_losses`, each `(L,)`.

    `tokens_per_expert` `(L, B, E)` counts the assignments of each sequence's unmasked tokens, and
    `dropped_assignments` `(L, B)` those among them for which the expert had no room (`None` without a capacity).
    With `skip_logits` and without gradients, `sequence_ce_losses` `(B,)` are the summed cross-entropies.
    `router_entropy` and `router_logit_max`, each `(L, B)`, are described in `router_statistics`.
    """

    ce_loss: torch.FloatTensor | None = None
    output_z_loss: torch.FloatTensor | None = None
    sequence_ce_losses: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None
    layer_aux_losses: torch.FloatTensor | None = None
    layer_z_losses: torch.FloatTensor | None = None
    tokens_per_expert: torch.LongTensor | None = None
    dropped_assignments: torch.LongTensor | None = None
    router_entropy: torch.FloatTensor | None = None
    router_logit_max: torch.FloatTensor | None = None
