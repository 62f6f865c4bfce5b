"""The peers of each suite by name."""

from collections.abc import Iterable

from .autoep import BEST_OPTIONS, AutoEPBlock
from .base import LayerPeer
from .blocks import IMPLEMENTATIONS, OUR_KERNEL, Block
from .kernel_libraries import LigerBlock, MegaBlocksBlock, ScatterMoEBlock, SonicMoEBlock, TutelBlock

OURS = "ours"
CEILING = "matmul"
"""Names of our row, and of one dense matrix product of the same FLOPs."""

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


def layer_peers() -> list[LayerPeer]:
    """Return ours first, then every peer of the layer suite."""
    return [
        Block("ours", OUR_KERNEL, OURS),
        # Our kernel in another's block: what its own router costs is not ours.
        Block("mixtral", OUR_KERNEL),
        *(Block(family, name) for family in FAMILIES for name in IMPLEMENTATIONS),
        *(LigerBlock(family) for family in FAMILIES),
        AutoEPBlock("autoep"),
        AutoEPBlock("autoep/best", **BEST_OPTIONS),
        SonicMoEBlock(),
        ScatterMoEBlock(),
        MegaBlocksBlock(),
        TutelBlock(),
    ]


def choose(peers: Iterable[LayerPeer], names: list[str] | None) -> list[LayerPeer]:
    """Return ours and the peers of the names, or all without names."""
    return [peer for peer in peers if names is None or peer.name == OURS or peer.name in names]
