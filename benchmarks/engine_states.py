"""The tensors of which a DeepSpeed engine's states consist."""

from collections.abc import Iterable, Iterator

import torch


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Return the bytes of every storage that one of the tensors is a view of, by its address."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def weights_of(engine) -> Iterator[torch.Tensor | None]:
    for parameter in engine.module.parameters():
        yield parameter.data
        yield getattr(parameter, "ds_tensor", None)


def gradients_of(engine) -> Iterator[torch.Tensor | None]:
    for parameter in engine.module.parameters():
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for name in ("all_grad_tensors", "averaged_gradients"):
        for tensors in getattr(engine.optimizer, name, {}).values():
            yield from tensors or ()
    yield getattr(engine.optimizer, "grad_partitions_flat_buffer", None)


def optimizer_states_of(engine) -> Iterator[torch.Tensor]:
    for state in engine.basic_optimizer.state.values():
        # The number of steps is not worth counting.
        yield from (value for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups"):
        for group in getattr(engine.optimizer, name, ()):
            yield from group if isinstance(group, list) else [group]
