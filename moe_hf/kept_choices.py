"""Gradient checkpointing that recomputes everything but the choice of experts.

Sums in another order, as on a GPU, can turn a choice between nearly equal scores: gradients that are recomputed with
another choice would belong to experts that have not made the output. Kept is what every choice comes from, the results
of top-k and sort.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class KeptChoices(TorchDispatchMode):
    """Keeps the results of every top-k and sort, in order, or hands out those that a first forward pass has kept.

    Torch's own selective checkpointing counts all other operations too and refuses to see more of them the second time,
    as when ZeRO-3 fetches weights that were there at first.
    """

    _CHOICES = (torch.ops.aten.topk.default, torch.ops.aten.sort.stable)

    def __init__(self, kept: list[tuple[torch.Tensor, ...]], recomputes: bool) -> None:
        super().__init__()
        self._kept, self._recomputes = kept, recomputes

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts make no choices."""
        return True

    def __enter__(self):
        self._place = 0  # recomputation may end early, and come again
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self._CHOICES:
            return func(*args, **(kwargs or {}))
        if not self._recomputes:
            self._kept.append(tuple(func(*args, **(kwargs or {}))))
        result = self._kept[self._place]
        self._place += 1
        return tuple(tensor.detach() for tensor in result)


def keep_choices() -> tuple[KeptChoices, KeptChoices]:
    """Return the contexts of one checkpoint's forward pass and of its recomputation."""
    kept = []
    return KeptChoices(kept, recomputes=False), KeptChoices(kept, recomputes=True)
