"""Balancing without a loss: after each optimizer step every router's biases move against the load of its experts."""

import torch

from ..modeling_moe import MoEForCausalLM
from ..routing import MoERouter


class RouterBiasUpdater:
    r"""Move the routers' biases: `b_i += speed * sign(mean(c) - c_i)` (Wang et al. 2024, arXiv 2408.15664, alg. 1).

    `c_i` counts the assignments to expert i over the whole batch of an optimizer step: all micro-batches, which the
    model has added up, and all data-parallel ranks, which are summed here. So every rank makes the same update.

    Args:
        model: trained in this process, not wrapped; its routers may sit in expert-parallel layers. A model whose
            `router_balancing` is not `"loss_free"` is left as it is, and so is one whose routers are frozen.
    """

    def __init__(self, model: MoEForCausalLM) -> None:
        self._model = model
        self._routers = [module for module in model.modules() if isinstance(module, MoERouter)]
        is_trained = all(router.weight.requires_grad for router in self._routers)
        self._speed = model.config.router_bias_update_speed if is_trained else 0.0
        # What an interrupted step has counted belongs to no step of this run.
        model.assignment_counts = None

    @torch.no_grad()
    def step(self, skipped: bool = False) -> None:
        """Update the biases by the counts since the last call, and begin to count anew (a collective call).

        Args:
            skipped: the optimizer made no step, because gradients were not finite; then the biases make none either.
        """
        counts, self._model.assignment_counts = self._model.assignment_counts, None
        if counts is None or skipped or self._speed == 0:
            return
        if self._model.reduce_router_statistics is not None:
            counts = self._model.reduce_router_statistics(counts)
        # In integers, so that an expert with exactly the mean load stays where it is.
        directions = torch.sign(counts.sum(dim=-1, keepdim=True) - counts.shape[-1] * counts)
        for router, direction in zip(self._routers, directions, strict=True):
            bias = router.e_score_correction_bias
            bias.add_(self._speed * direction.to(bias))
