"""Sequence parallelism: each rank of a group holds a piece of every sequence and, in attention, a share of the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509): an all-to-all before attention exchanges pieces of the
sequence for heads, and one after it exchanges them back. Nothing else looks at more than one token, so for everything
else a rank with a piece of a sequence is a data-parallel rank: with losses that add up over ranks, its gradients are
averaged, its experts found and its states partitioned as those of any other rank. That is why the engine is not told:
DeepSpeed's own bookkeeping of such groups scales gradients by them, and its AutoEP takes them for tensor parallelism.

Shape letters: B sequences, S tokens of a whole sequence, P ranks of a group, N heads, D head size.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_causal_mask

from ..language_head import IGNORED_LABEL
from .versions import require_supported

require_supported("deepspeed")

from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # noqa: E402

Batch = dict[str, torch.Tensor]


def sequence_group(size: int) -> dist.ProcessGroup:
    """Return the group of `size` neighbouring ranks that this rank shares sequences with (a collective call)."""
    group, _ = dist.new_subgroups(group_size=size)
    return group


class UlyssesSequence:
    """One batch of whole sequences, of which this rank holds a piece: a `SharedSequence` for the model's forward pass.

    Args:
        group: the ranks that hold the other pieces, in the order of the pieces.
        attention_mask: `(B, S)`, 0 on padding; of the whole sequences, as `position_ids`.
        position_ids: `(B, S)`; where they restart without a mask, a new document begins.
    """

    def __init__(
        self, group: dist.ProcessGroup, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> None:
        self.attention_mask, self.position_ids = attention_mask, position_ids
        self._group = group
        self._ulysses: UlyssesSPAttentionHF | None = None
        self._mask: torch.Tensor | None = None

    def attend(
        self,
        attend: Callable,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with this rank's share of the heads over the whole sequences, by any implementation (collective).

        Args:
            attend: an attention function of Transformers.
            module: whose heads these are.
            query: `(B, N, S / P, D)`; `key` and `value` likewise, with as many heads as there are of those.
            attention_mask: not looked at, because it knows the piece only.
            **kwargs: of `attend`; `position_ids` `(B, S / P)` among them.

        Returns:
            `(B, S / P, N, D)`, and the weights of this rank's heads over the whole sequences if `attend` has any.
        """
        if self._ulysses is None:
            self._ulysses = self._build(attend, query, key)
            self._mask = self._whole_mask(module, query)
        groups = module.num_key_value_groups
        try:
            output, weights = self._ulysses(module, query, key, value, self._mask, **kwargs)
        finally:
            module.num_key_value_groups = groups  # changed by Ulysses where it repeats heads of keys
        return output.unflatten(-1, (query.shape[1], query.shape[-1])), weights

    def _build(self, attend: Callable, query: torch.Tensor, key: torch.Tensor) -> UlyssesSPAttentionHF:
        return UlyssesSPAttentionHF(
            attn=attend,
            batch_size=query.shape[0],
            attn_head_count=query.shape[1],
            attn_head_size=query.shape[3],
            kv_head_count=key.shape[1],
            num_hidden_layers=1,  # of use for its debugging only
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def _whole_mask(self, module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
        """Return what the model would have made of the whole batch in one process."""
        return create_causal_mask(
            config=module.config,
            inputs_embeds=query.new_empty(*self.position_ids.shape, 0),
            attention_mask=self.attention_mask,
            past_key_values=None,
            position_ids=self.position_ids,
        )

    @torch.no_grad()
    def sum(self, statistics: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the pieces (a collective call)."""
        return self._reduced(statistics, dist.ReduceOp.SUM)

    @torch.no_grad()
    def max(self, statistics: torch.Tensor) -> torch.Tensor:
        """Return the elementwise maximum of a tensor over the pieces (a collective call)."""
        return self._reduced(statistics, dist.ReduceOp.MAX)

    def _reduced(self, statistics: torch.Tensor, operation: dist.ReduceOp) -> torch.Tensor:
        total = statistics.clone()
        dist.all_reduce(total, op=operation, group=self._group)
        return total

    @torch.no_grad()
    def whole(self, piece: torch.Tensor) -> torch.Tensor:
        """Return `(N, S, D)` from every rank's `(N, S / P, D)` (a collective call)."""
        pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(pieces, piece.contiguous(), group=self._group)
        return torch.cat(pieces, dim=1)


def cut(batch: Batch, group: dist.ProcessGroup) -> dict[str, torch.Tensor | UlyssesSequence]:
    """Return this rank's piece of a batch that every rank of the group has read.

    Args:
        batch: `input_ids` and `labels`, and where there are any `attention_mask` and `position_ids`, each `(B, S)`
            with S a multiple of P.
        group: the ranks that share it.

    Returns:
        The same, each `(B, S / P)`, with `position_ids` in any case; `shift_labels`, the tokens to predict, of which
        the last one is the first of the next rank's piece; and `shared_sequence`.
    """
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)
        positions = positions.expand_as(batch["labels"]).contiguous()
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    pieces = {
        name: tensor.chunk(size, dim=1)[rank].contiguous()
        for name, tensor in {**batch, "position_ids": positions, "shift_labels": targets}.items()
    }
    return {**pieces, "shared_sequence": UlyssesSequence(group, batch.get("attention_mask"), positions)}


def gather_batches(batch: Batch, group: dist.ProcessGroup) -> list[Batch]:
    """Return the batches that the ranks of a group have read, in their order, on this rank's device (collective)."""
    batches = [None] * dist.get_world_size(group)
    dist.all_gather_object(batches, {name: tensor.cpu() for name, tensor in batch.items()}, group=group)
    device = batch["input_ids"].device
    return [{name: tensor.to(device) for name, tensor in of_rank.items()} for of_rank in batches]
