"""The part of the Trainer that shares sequences: ranks of a group read the same rows, and each trains on its piece."""

import argparse
from collections.abc import Callable

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..errors import ConfigError
from .flash_attention import document_bounds


def check_sequence_flags(namespace: argparse.Namespace, size: int) -> None:
    """Refuse flags with which the pieces of a sequence would be counted or read otherwise than the whole.

    Args:
        namespace: of the command line.
        size: ranks that share every sequence.

    Raises:
        ConfigError: naming the flag.
    """
    if size == 1:
        return
    if not namespace.average_tokens_across_devices:
        raise ConfigError(
            f"average_tokens_across_devices=False would weigh pieces of a sequence alike, however many labels they "
            f"have; leave it at True with sequence_parallel_size={size}."
        )
    if namespace.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            "train_sampling_strategy=batch_rebalance gives every rank rows of its own, but with "
            f"sequence_parallel_size={size} ranks share them; use random, sequential or group_by_length."
        )


def reader(args: TrainingArguments) -> tuple[int, int]:
    """Return which of how many readers of rows this process belongs to; those that share sequences are one."""
    size = _size(args)
    return args.process_index // size, args.world_size // size


def _size(args: TrainingArguments) -> int:
    return getattr(args, "sequence_parallel_size", None) or 1


class SequenceParallelTrainer(Trainer):
    """`Trainer` in which `args.sequence_parallel_size` neighbouring ranks share every sequence.

    What a rank trains on are pieces, and it counts their tokens and labels as other ranks do those of whole rows: all
    sums over ranks are then those of the batch. In an evaluation each rank keeps rows of its own, which the ranks of a
    group compute together, one rank's after the other's.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._sequence_group = None
        if _size(self.args) > 1:
            from ..parallel.ulysses import sequence_group

            self._sequence_group = sequence_group(_size(self.args))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """As in `Trainer`, in rows."""
        return super().get_total_train_batch_size(args) // _size(args)

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        if self._sequence_group is not None and is_training:
            sampler = loader.batch_sampler
            if not isinstance(sampler, BatchSamplerShard) or sampler.split_batches:
                raise ConfigError(
                    "accelerator_config must leave split_batches and dispatch_batches at False with "
                    f"sequence_parallel_size={_size(self.args)}: ranks that share rows read them by themselves."
                )
            # Accelerate takes every process for a reader of its own.
            sampler.process_index, sampler.num_processes = reader(self.args)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, but in a group the batches are this rank's pieces of those that were read."""
        if self._sequence_group is not None:
            epoch_iterator = map(self._cut, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _cut(self, batch: dict) -> dict:
        from ..parallel.ulysses import cut

        is_flash = "flash" in self.accelerator.unwrap_model(self.model).config._attn_implementation
        # Attention sees whole rows, so it is told of all their documents.
        return {**cut(batch, self._sequence_group), **(document_bounds(batch) if is_flash else {})}

    def _evaluate_together(
        self, batch: dict[str, torch.Tensor], evaluate: Callable[[dict], torch.Tensor]
    ) -> torch.Tensor:
        """Return `evaluate(batch)`; in a group, after every rank has called it with its piece of each rank's batch."""
        if self._sequence_group is None:
            return evaluate(batch)
        from ..parallel.ulysses import gather_batches

        results = [evaluate(self._cut(of_rank)) for of_rank in gather_batches(batch, self._sequence_group)]
        return results[self.args.process_index % _size(self.args)]
