"""What memory is made of: named amounts of bytes, each in one place, that a rank holds at certain times."""

from collections.abc import Iterable
from dataclasses import dataclass

GPU, HOST, DISK = "gpu", "host", "nvme"
"""Places of bytes."""

ALWAYS, COMPUTING, STEPPING = "always", "computing", "stepping"
"""When bytes are held: all the time; in forward and backward passes; in the step of the optimizer."""


@dataclass(frozen=True)
class Amount:
    """Bytes of one rank.

    Args:
        kind: `"weights"`, `"gradients"`, `"optimizer"`, `"activations"` or `"buffers"`.
        name: what it is, in words.
        bytes: how many.
        place: `GPU`, `HOST` or `DISK`.
        when: `ALWAYS`, `COMPUTING` or `STEPPING`.
    """

    kind: str
    name: str
    bytes: int
    place: str = GPU
    when: str = ALWAYS


def total(amounts: Iterable[Amount], *, kind: str | None = None, place: str = GPU, when: str | None = None) -> int:
    """Return the bytes of all amounts in a place, of one kind or time if it is given."""
    return sum(
        a.bytes for a in amounts if a.place == place and kind in (None, a.kind) and (when is None or a.when == when)
    )


def peak(amounts: Iterable[Amount], place: str = GPU) -> int:
    """Return the most bytes that a place holds at one time: activations are gone when the optimizer steps."""
    amounts = list(amounts)
    at_times = [total(amounts, place=place, when=time) for time in (COMPUTING, STEPPING)]
    return total(amounts, place=place, when=ALWAYS) + max(at_times)
