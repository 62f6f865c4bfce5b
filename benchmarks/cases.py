"""What is measured: sizes by name, and what follows from them: FLOPs, and the least that backward needs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
"""How far results may be from the reference, as `norm(a - b) / norm(b)`."""


@dataclass(frozen=True)
class LayerCase:
    """One sparse block and its tokens.

    Args:
        name: on the command line.
        tokens: T.
        hidden_size: H.
        num_experts: E.
        top_k: experts of a token, K.
        width: inner width of one expert, I.
        dtype: key of `DTYPES`.
        routing: `"skewed"`, tokens as frequent as words are, or `"balanced"`, every expert gets equally many.
    """

    name: str
    tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    width: int
    dtype: str = "fp32"
    routing: str = "skewed"

    @property
    def rows(self) -> int:
        """Assignments of tokens to experts, N = T * K."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of forward and backward: 6 for each token and parameter of the router and of its K experts."""
        return 6 * self.tokens * self.hidden_size * (3 * self.top_k * self.width + self.num_experts)

    @property
    def minimum_saved(self) -> int:
        """Bytes of a token that backward cannot do without: the layer's input and the gate-up product.

        2 H + 4 K I in 16 bits (SonicMoE, arXiv 2512.14080, section 3).
        """
        return DTYPES[self.dtype].itemsize * (self.hidden_size + 2 * self.top_k * self.width)

    @property
    def parameter_bytes(self) -> int:
        """Of the experts' and the router's weights."""
        return DTYPES[self.dtype].itemsize * self.num_experts * self.hidden_size * (3 * self.width + 1)


@dataclass(frozen=True)
class StepCase:
    """A whole model and one optimizer step of it.

    Args:
        name: on the command line.
        family: whose architecture it is: `"mixtral"`, `"qwen3_moe"` (norms of queries and keys by head) or `"olmoe"`
            (over the whole projection).
        layers: L, all of them sparse.
        heads: of queries.
        key_heads: of keys and values.
        vocab_size: V.
        batch: sequences of a micro-batch, B.
        sequence_length: S.
        accumulation: micro-batches of one optimizer step.

    The others are those of `LayerCase`.
    """

    name: str
    hidden_size: int
    num_experts: int
    top_k: int
    width: int
    layers: int
    heads: int
    key_heads: int
    vocab_size: int
    batch: int
    sequence_length: int
    family: str = "mixtral"
    dtype: str = "bf16"
    accumulation: int = 1

    @property
    def micro_tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch * self.sequence_length

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.accumulation * self.micro_tokens

    @property
    def parameters(self) -> int:
        """Of the whole model, without its norms."""
        head_size = self.hidden_size // self.heads
        attention = 2 * self.hidden_size * head_size * (self.heads + self.key_heads)
        experts = self.num_experts * self.hidden_size * (3 * self.width + 1)
        return self.layers * (attention + experts) + 2 * self.vocab_size * self.hidden_size

    @property
    def activation_bytes(self) -> int:
        """About what is held of a micro-batch when backward begins, of a model in 16 bits that saves a lot.

        Of a token: in every layer 3.3 times what its experts cannot do without, and 12 values of 16 bits for each of
        the H around them (two norms in 32 bits, projections, attention); the logits in 16 and in 32 bits, with their
        softmax and gradients.
        """
        experts = 3.3 * 2 * (self.hidden_size + 2 * self.top_k * self.width)
        return int(self.micro_tokens * (self.layers * (experts + 24 * self.hidden_size) + 16 * self.vocab_size))


_LAYERS = {
    "cpu": (LayerCase("e8", 2048, 512, 8, 2, 1024), LayerCase("e64", 2048, 512, 64, 2, 256)),
    "cuda": (
        LayerCase("a", 16384, 2048, 8, 2, 1792),
        LayerCase("b", 16384, 2048, 64, 8, 1024),
        LayerCase("c", 32768, 1024, 64, 2, 512),
    ),
}
_DTYPES_OF = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}

_STEPS = {
    "cpu": (StepCase("e64", 512, 64, 2, 256, 2, 8, 8, 8192, batch=2, sequence_length=1024),),
    # So many micro-batches that the optimizer, the same for all, takes a small part of the step, as in training.
    "cuda": (
        StepCase("a", 2048, 8, 2, 1792, 12, 16, 4, 50304, 8, 4096, "mixtral", accumulation=2),
        StepCase("b", 2048, 64, 8, 1024, 16, 16, 16, 50304, 2, 4096, "olmoe", accumulation=16),
        StepCase("c", 1024, 64, 2, 512, 16, 16, 16, 50304, 16, 2048, "qwen3_moe", accumulation=4),
    ),
}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


def layer_cases(device: str, names: list[str] | None = None) -> list[LayerCase]:
    """Return the layers that are measured on a device, in every precision, skewed and balanced; of the names only."""
    return [
        replace(case, dtype=dtype, routing=routing)
        for case in _LAYERS[device]
        if names is None or case.name in names
        for dtype in _DTYPES_OF[device]
        for routing in ("skewed", "balanced")
    ]


def step_cases(device: str, names: list[str] | None = None) -> list[StepCase]:
    """Return the models that are measured on a device, of the names only.

    On a CPU as each family has them, on a GPU, where time is short, each in the family that it is like.
    """
    chosen = [case for case in _STEPS[device] if names is None or case.name in names]
    if device == "cuda":
        return chosen
    return [replace(case, family=family) for case in chosen for family in FAMILIES]


def names_of_cases(device: str, suites: Iterable[str]) -> list[str]:
    """Return the names that the suites know on a device."""
    known = {"layer": _LAYERS[device], "step": _STEPS[device], "profile": (*_LAYERS[device], *_STEPS[device])}
    return list(dict.fromkeys(case.name for suite in suites for case in known.get(suite, ())))
