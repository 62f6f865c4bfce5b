"""What can be counted and does not depend on who else uses the machine: operators, synchronisations, bytes."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

# What makes a host wait for its GPU: a value, or a size that depends on values. On the CPU they stand for it.
_SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique_dim", "_unique2", "equal")


class OperatorCount(TorchDispatchMode):
    """Counts what the dispatcher is asked to compute; views are not, and an operator counts once with all within it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not _is_view(func):
            self.operators[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Number of all operators."""
        return self.operators.total()

    @property
    def synchronisations(self) -> int:
        """Number of those for which a host would wait for its GPU."""
        found = (count for name, count in self.operators.items() if name.partition("::")[2] in _SYNCHRONISING)
        return sum(found)


def _is_view(func) -> bool:
    """Whether an operator returns nothing but its arguments in another shape."""
    returned = func._schema.returns
    aliases = [value.alias_info for value in returned]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def saved_bytes(forward: Callable[[], torch.Tensor], leave_out: Iterable[torch.Tensor]) -> int:
    """Return the bytes that autograd saves in a forward pass, every storage once.

    Args:
        forward: run once.
        leave_out: weights, which are there anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage  # kept, so that no other gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for address, storage in found.items() if address not in known)


@contextmanager
def counted_synchronisations(device: str) -> Iterator[list[int]]:
    """Yield a list that gets the number of times that the host has waited for its GPU; on the CPU, of `OperatorCount`.

    Waiting at the end of the block itself is not counted.
    """
    counts: list[int] = []
    if device != "cuda":
        with OperatorCount() as counted:
            yield counts
        counts.append(counted.synchronisations)
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.append(sum("synchroniz" in str(warning.message) for warning in met))


@dataclass(frozen=True)
class MemoryUse:
    """Bytes allocated above what was there before.

    Args:
        held: behind the forward pass, for backward; with the output.
        peak: the most at one time of forward and backward, gradients included.
    """

    held: int
    peak: int


def memory_use(device: str, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None]) -> MemoryUse:
    """Run a forward and a backward pass, and return what they allocate, inside operators too.

    Buffers that libraries of the CPU keep for themselves are not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = forward()
        held = torch.cuda.memory_allocated() - before
        backward(output)
        torch.cuda.synchronize()
        return MemoryUse(held, torch.cuda.max_memory_allocated() - before)
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        output = forward()
        with torch.autograd.profiler.record_function(_BORDER):
            pass
        backward(output)
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = now = 0
    for event in events:
        if event.name() == _BORDER:
            held = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return MemoryUse(held, peak)


_BORDER = "benchmarks::backward"
