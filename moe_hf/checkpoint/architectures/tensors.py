"""Which tensors of another architecture are which parts of ours."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

Read = Callable[[str], torch.Tensor | None]


class Piece(NamedTuple):
    """A tensor of another architecture, and where it stands in one of ours; the index `()` is all of it."""

    native_name: str
    moe_name: str
    index: tuple[int | slice, ...] = ()


class TensorMap:
    """Translates between the tensors of one model under two sets of names.

    Args:
        pieces: every tensor of the other architecture, in the order in which a file should hold them.
        expected: our tensors on the meta device by their names.
    """

    def __init__(self, pieces: Iterable[Piece], expected: Mapping[str, torch.Tensor]) -> None:
        self.expected = dict(expected)
        self.by_native = {piece.native_name: piece for piece in pieces}
        self.by_moe: dict[str, list[Piece]] = {}
        for piece in self.by_native.values():
            self.by_moe.setdefault(piece.moe_name, []).append(piece)

    def native_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the other architecture, on the meta device, by their names."""
        # Not views: whoever plans files looks at the storage behind a tensor.
        return {
            name: torch.empty_like(self.expected[piece.moe_name][piece.index]) for name, piece in self.by_native.items()
        }

    def read_native(self, name: str, read_moe: Read) -> torch.Tensor | None:
        """Return one of their tensors; `read_moe` returns one of ours, or `None` on a process that does not write."""
        piece = self.by_native[name]
        tensor = read_moe(piece.moe_name)
        # A copy, so that one expert does not keep all of them in memory.
        return tensor[piece.index].clone() if piece.index and tensor is not None else tensor

    def read_moe(self, name: str, read_native: Read, dtype: torch.dtype) -> torch.Tensor:
        """Return one of our tensors, put together in `dtype` where it has several parts and as stored where not."""
        pieces = self.by_moe[name]
        if not pieces[0].index:
            return read_native(pieces[0].native_name)
        whole = torch.empty(self.expected[name].shape, dtype=dtype)
        for piece in pieces:
            whole[piece.index] = read_native(piece.native_name)
        return whole


def expert_pieces(moe_name: str, prefix: str, parts: tuple[str, str, str], expected: torch.Tensor) -> list[Piece]:
    """Cut the fused weights of all experts into the matrices of each.

    Args:
        moe_name: `….experts.gate_up_proj` `(E, 2I, H)` or `….experts.down_proj` `(E, H, I)`.
        prefix: what comes before the number of the expert in their names.
        parts: their names of an expert's gate, up and down projection.
        expected: the fused tensor on the meta device.
    """
    gate, up, down = parts
    experts = range(expected.shape[0])
    if moe_name.endswith("down_proj"):
        return [Piece(f"{prefix}{e}.{down}.weight", moe_name, (e,)) for e in experts]
    half = expected.shape[1] // 2
    return [
        Piece(f"{prefix}{e}.{part}.weight", moe_name, (e, rows))
        for e in experts
        for part, rows in ((gate, slice(0, half)), (up, slice(half, None)))
    ]


def keep_last(read: Read) -> Read:
    """Wrap `read` so that asking for the same name again and again reads it once; only the last one is held."""
    last: dict[str, torch.Tensor | None] = {}

    def read_once(name: str) -> torch.Tensor | None:
        if name not in last:
            last.clear()
            last[name] = read(name)
        return last[name]

    return read_once
