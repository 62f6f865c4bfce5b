"""The peers of each suite by name."""

from collections.abc import Iterable
from typing import TypeVar

from ..cases import FAMILIES
from .autoep import BEST_OPTIONS, AutoEPBlock
from .base import LayerPeer
from .blocks import IMPLEMENTATIONS, OUR_KERNEL, Block
from .kernel_libraries import LigerBlock, MegaBlocksBlock, ScatterMoEBlock, SonicMoEBlock, TutelBlock
from .models import AutoEPModel, LigerModel, ModelPeer, OurModel, OurOptimizer, TransformersModel
from .our_models import OurCompiledModel, OurLigerModel, OurSonicMoEModel

OURS = "ours"
CEILING = "matmul"
"""Names of our row, and of one dense matrix product of the same FLOPs."""

Peer = TypeVar("Peer", LayerPeer, ModelPeer)


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


def model_peers(family: str) -> list[ModelPeer]:
    """Return ours first, then every peer of the step suite that has a family's architecture."""
    grouped = f"{family}/grouped_mm"
    autoep = [AutoEPModel("autoep"), AutoEPModel("autoep/best", compiles=True, **BEST_OPTIONS)]
    return [
        OurModel(OURS),
        # Our kernel in another's model.
        *(TransformersModel(f"{family}/{name}", name) for name in (OUR_KERNEL, *IMPLEMENTATIONS)),
        OurOptimizer(f"{grouped}/our_optimizer", "grouped_mm"),
        TransformersModel(f"{grouped}/adamw_torch", "grouped_mm", optim="adamw_torch"),
        LigerModel(f"{family}/liger"),
        OurLigerModel(f"{OURS}/liger"),
        OurCompiledModel(f"{OURS}/compiled"),
        OurSonicMoEModel(f"{OURS}/sonicmoe"),
        *(autoep if family == "mixtral" else []),
    ]


def choose(peers: Iterable[Peer], names: list[str] | None) -> list[Peer]:
    """Return ours and the peers of the names, in the order of these, or all without names."""
    if names is None:
        return list(peers)
    by_name = {peer.name: peer for peer in peers}
    return [by_name[name] for name in dict.fromkeys([OURS, *names]) if name in by_name]
