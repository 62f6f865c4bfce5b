"""Our kernel inside DeepSpeed's expert-parallel layer.

AutoEP's own layer gathers every row twice, once to sort and once to pad, multiplies with gate and up apart and weighs
in float32 beside the rows. This one sends rows, computes them where they arrive and sums what comes back.
"""

import torch
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, SplitPlan, _AllToAllV, compute_split_plan
from deepspeed.moe.ep_experts import GroupedExperts

from ..kernels.dispatch import gather_rows, sum_rows
from ..kernels.expert_order import ExpertOrder
from ..kernels.experts import run_experts, sort_by_expert


class KernelExperts(GroupedExperts):
    """AutoEP's experts, which compute rows in any order; `w1`, `w3` and `w2` stay as AutoEP has made them."""

    def forward(self, x: torch.Tensor, *rows: torch.Tensor, top_k_weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sums of each token's experts, or, given sorted rows with their counts, what AutoEP returns.

        Args:
            x: `(T, H)`.
            rows: the tensors of an `ExpertOrder`, one by one as ZeRO-3 takes arguments; or the counts `(E,)` of rows
                that are sorted.
            top_k_weights: `(T, K)`; `None` where every row weighs 1.
        """
        if len(rows) == 1:
            return super().forward(x, *rows)
        return run_experts(x, top_k_weights, ExpertOrder(*rows), [self.w1, self.w3], self.w2)


class ExpertParallelLayer(AutoEPMoELayer):
    """AutoEP's layer with our kernel, wherever rows go by plain all-to-all."""

    @classmethod
    def take_over(cls, layer: AutoEPMoELayer) -> None:
        """Make a layer that AutoEP has converted one of these; its parameters stay the same objects.

        A layer stays as it is where the JSON asks for another way of AutoEP than its default.
        """
        experts = layer.experts
        asks_for_others = not experts.use_grouped_mm or experts.gate_up_impl != "separate"
        if experts.activation == "swiglu" and layer.combine_impl == "weighted_sum" and not asks_for_others:
            layer.__class__, experts.__class__ = cls, KernelExperts

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._is_left_to_autoep():
            return super()._forward(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k_weights, top_k_index, tokens_per_expert = self.router(tokens, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(tokens_per_expert)
        order = sort_by_expert(top_k_index, self.num_experts)
        if self.ep_size == 1:
            output = self.experts(tokens, *order, top_k_weights=top_k_weights)
        else:
            plan = compute_split_plan(
                selected_experts=top_k_index,
                num_experts=self.num_experts,
                ep_size=self.ep_size,
                num_local_experts=self.num_local_experts,
                ep_group=self.ep_group,
                num_tokens_per_expert=tokens_per_expert,
            )
            output = sum_rows(self._visit(gather_rows(tokens, order), plan), top_k_weights, order)
        return self._finalize_output(output.view_as(hidden_states), tokens, hidden_states, hidden_states.shape[-1])

    def _is_left_to_autoep(self) -> bool:
        folds_tensor_parallelism = (
            self.folding_group_handles is not None and self.folding_group_handles.spec.tp_size > 1
        )
        return (
            folds_tensor_parallelism
            or self.async_split_plan
            or self.score_apply != "post"
            or (self.ep_size > 1 and self.comm_backend != COMM_BACKEND)
        )

    def _visit(self, rows: torch.Tensor, plan: SplitPlan) -> torch.Tensor:
        """Send rows `(N, H)`, sorted by expert, to their experts and return what these make of them, in that order."""
        arrived = _AllToAllV.apply(self.ep_group, rows, plan.input_splits, plan.output_splits)
        computed = self.experts(arrived, *self._order_of_arrivals(plan))
        return _AllToAllV.apply(self.ep_group, computed, plan.output_splits, plan.input_splits)

    def _order_of_arrivals(self, plan: SplitPlan) -> ExpertOrder:
        """Sort rows that have come rank by rank, each rank's by expert."""
        counts = plan.local_counts_by_source
        experts = torch.arange(self.num_local_experts, device=counts.device).expand_as(counts)
        # The sum is known here: torch would otherwise wait for the device to tell it.
        arrivals = experts.flatten().repeat_interleave(counts.flatten(), output_size=sum(plan.output_splits))
        return sort_by_expert(arrivals.unsqueeze(1), self.num_local_experts)
