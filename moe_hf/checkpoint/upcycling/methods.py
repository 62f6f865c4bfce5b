r"""Ways to make the experts of a sparse layer out of the MLP of a dense one.

A dense MLP of width I is `down(silu(gate x) * (up x))`: a sum over I hidden units, each with a row of `gate`, a row of
`up` and a column of `down`. Every method works on units, so it is handed matrices with one row per unit, `(I, H)`:
`gate_proj` and `up_proj` as they are stored, and `down_proj` transposed.

With routing weights that sum to 1 (`norm_topk_prob=True`), K equal experts are the dense MLP whatever the router says.

Shape letters: H hidden size, I width of the dense MLP, E experts, K experts per token, G granularity.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import ConfigError


class ExpertMatrix(NamedTuple):
    """One of the three matrices of one expert.

    Args:
        layer: name of the sparse layer, as in the weights' names.
        projection: `"gate_proj"`, `"up_proj"` or `"down_proj"`.
        expert: which of the experts.
        num_experts: E.
        seed: of the whole model; with the names above, what random numbers are drawn by.
    """

    layer: str
    projection: str
    expert: int
    num_experts: int
    seed: int


def seeded(seed: int, *names: str | int) -> torch.Generator:
    """Return a generator whose numbers depend on the seed and the names alone, not on what was drawn before."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Method(ABC):
    """What methods share: if not said otherwise, experts are as wide as the dense MLP, and the router is random."""

    def check(self, num_experts: int, num_experts_per_tok: int, intermediate_size: int) -> None:
        """Raise `ConfigError` when such experts cannot be made of an MLP of this width."""
        return

    def expert_width(self, intermediate_size: int) -> int:
        """Return the width of an expert."""
        return intermediate_size

    def router(self, shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
        """Return the router's weight, float32 `(E, H)`, drawn from N(0, std**2)."""
        return torch.normal(0.0, std, tuple(shape), generator=generator)

    @abstractmethod
    def expert(self, units: torch.Tensor, matrix: ExpertMatrix) -> torch.Tensor:
        """Return one matrix of one expert, float32 `(expert_width(I), H)`.

        Args:
            units: the same matrix of the dense MLP, float32 `(I, H)`, one row per unit.
            matrix: which one is made.
        """


@dataclass(frozen=True)
class Copy(Method):
    """Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is the dense MLP.

    The model's logits are those of the dense model. Experts part because they see different tokens.
    """

    def expert(self, units: torch.Tensor, matrix: ExpertMatrix) -> torch.Tensor:
        return units


@dataclass(frozen=True)
class Noise(Method):
    r"""Copies that noise sets apart from the first step on.

    Each matrix W of each expert becomes `W + m * e` with independent `m ~ Bernoulli(fraction)` and
    `e ~ N(0, (std * s)**2)` for every element, where s is the standard deviation of W's elements.

    Args:
        std: of the noise, relative to that of the matrix.
        fraction: share of the elements that get noise, in (0, 1].
    """

    std: float = 0.1
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise ConfigError(f"--noise-std {self.std} must be a finite number above 0.")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"--noise-fraction {self.fraction} must be above 0 and at most 1.")

    def expert(self, units: torch.Tensor, matrix: ExpertMatrix) -> torch.Tensor:
        generator = seeded(matrix.seed, "noise", matrix.layer, matrix.projection, matrix.expert)
        noise = torch.randn(units.shape, generator=generator) * (self.std * units.std())
        return units + noise * (torch.rand(units.shape, generator=generator) < self.fraction)


@dataclass(frozen=True)
class Granular(Method):
    r"""Fine-grained experts in virtual groups (He et al. 2024, arXiv 2410.07524).

    The dense MLP is cut into G shards of I / G consecutive units, and each shard is copied to C = E / G experts. A
    virtual group is one copy of every shard: G experts that together are the dense MLP. They share their row of the
    router, so their scores are equal, and the K = t * G best experts are the t best groups, each as a whole. The last
    place of the top-k is the last of a group, so it does not matter in which order a backend takes equal scores.
    Only two groups whose scores float32 cannot tell apart could be cut; with random rows that is some token in a
    million.

    Each expert of a chosen group with score p has the weight `p / (G * sum of the t groups' p)`, so that over the t
    groups each shard has the weight `1 / G`. `down_proj` is multiplied by G, and the logits are those of the dense
    model; where G is a power of two the product is exact in every floating-point format.

    Expert e holds shard `e // C` and belongs to group `e % C`. Where expert parallelism gives each rank a run of
    consecutive experts, the experts of a token are then spread over the ranks.

    Args:
        granularity: G.
    """

    granularity: int

    def __post_init__(self) -> None:
        if self.granularity < 2:
            raise ConfigError(f"--granularity {self.granularity} must be at least 2; whole experts are --method copy.")

    def check(self, num_experts: int, num_experts_per_tok: int, intermediate_size: int) -> None:
        numbers = {
            "--num-experts": num_experts,
            "--num-experts-per-tok": num_experts_per_tok,
            "the model's intermediate_size": intermediate_size,
        }
        for name, number in numbers.items():
            if number % self.granularity:
                raise ConfigError(f"{name} {number} must be a multiple of --granularity {self.granularity}.")

    def expert_width(self, intermediate_size: int) -> int:
        return intermediate_size // self.granularity

    def router(self, shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
        num_experts, hidden_size = shape
        groups = super().router(torch.Size((num_experts // self.granularity, hidden_size)), std, generator)
        return groups.repeat(self.granularity, 1)

    def expert(self, units: torch.Tensor, matrix: ExpertMatrix) -> torch.Tensor:
        num_copies = matrix.num_experts // self.granularity
        shard = units.chunk(self.granularity)[matrix.expert // num_copies]
        return shard * self.granularity if matrix.projection == "down_proj" else shard


@dataclass(frozen=True)
class Drop(Method):
    r"""Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261, sec. 3): copies, of which a part is drawn anew.

    Each expert draws a set S of `round(ratio * I)` units. Of its three matrices the weights of these units are dropped
    and drawn from `N(m, s**2)`, where m and s are the mean and standard deviation of the weights dropped from that
    matrix. The other units are the dense MLP's.

    Args:
        ratio: share of the units that are drawn anew, in (0, 1).
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(f"--drop-ratio {self.ratio} must be above 0 and below 1; 0 is --method copy.")

    def check(self, num_experts: int, num_experts_per_tok: int, intermediate_size: int) -> None:
        if not 0 < self._num_dropped(intermediate_size) < intermediate_size:
            raise ConfigError(
                f"--drop-ratio {self.ratio} of the model's intermediate_size {intermediate_size} leaves "
                f"{intermediate_size - self._num_dropped(intermediate_size)} units as they are; choose one nearer 0.5."
            )

    def expert(self, units: torch.Tensor, matrix: ExpertMatrix) -> torch.Tensor:
        # Drawn without the projection's name: the three matrices of an expert lose the same units.
        shuffled = torch.randperm(len(units), generator=seeded(matrix.seed, "units", matrix.layer, matrix.expert))
        dropped = shuffled[: self._num_dropped(len(units))]
        old = units[dropped]
        generator = seeded(matrix.seed, "values", matrix.layer, matrix.projection, matrix.expert)
        new = old.mean() + old.std() * torch.randn(old.shape, generator=generator)
        return units.index_copy(0, dropped, new)

    def _num_dropped(self, intermediate_size: int) -> int:
        return round(self.ratio * intermediate_size)
