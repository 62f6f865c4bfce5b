"""How much memory operators hold at a time, counted tensor by tensor: the same on every machine and in every run."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and not yet let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if torch.is_tensor(tensor) and (place := tensor.untyped_storage()._cdata) not in self._known:
                size = tensor.untyped_storage().nbytes()
                self._known.add(place)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._forget, place, size)
        return result

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size
