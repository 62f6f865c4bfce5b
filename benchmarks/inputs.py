"""Weights and tokens of a layer, the same for all that are compared.

Tokens are drawn as words of a text are: few of them often (Zipf 1935), each a little different where it stands, and all
with a direction in common (Ethayarajh 2019, arXiv 1909.00512). A random router then loads its experts unequally, as
routers early in training do. Tokens for which rounding could tip the choice of experts are drawn anew: an expert more
or less is a different result, not a less exact one.
"""

from dataclasses import dataclass

import torch

from .cases import DTYPES, LayerCase

_WORDS = 4096

# Beside a word's own vector: what its place adds, and what all have in common.
_PLACE, _COMMON = 0.5, 0.5

# By how much the last chosen expert's logit is above the first one that is not; bfloat16 rounds logits by about 0.01.
_MARGIN = 0.06


@dataclass(frozen=True)
class LayerInputs:
    """What every layer gets; weights in Transformers' layout.

    Args:
        hidden_states: `(T, H)`.
        output_gradient: `(T, H)`.
        weights: `router` `(E, H)`, `gate_up` `(E, 2I, H)` with the gates first, `down` `(E, H, I)`.
        tokens_per_expert: `(E,)` int64.
    """

    hidden_states: torch.Tensor
    output_gradient: torch.Tensor
    weights: dict[str, torch.Tensor]
    tokens_per_expert: torch.Tensor

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest expert over the mean."""
        return float(self.tokens_per_expert.max() / self.tokens_per_expert.double().mean())


def make_inputs(case: LayerCase, device: str = "cpu", seed: int = 0) -> LayerInputs:
    """Draw weights and tokens, in the case's precision.

    Args:
        case: the layer.
        device: where to.
        seed: of all that is drawn; the same on every device.
    """
    draw = torch.Generator().manual_seed(seed)
    experts, hidden, width = case.num_experts, case.hidden_size, case.width
    dtype = DTYPES[case.dtype]
    router = (torch.randn(experts, hidden, generator=draw) * hidden**-0.5).to(dtype)
    tokens = _skewed(case, router.float(), draw) if case.routing == "skewed" else _balanced(case, router.float(), draw)
    tokens = tokens.to(dtype)
    chosen = (tokens.float() @ router.float().t()).topk(case.top_k).indices
    weights = {
        "router": router,
        "gate_up": torch.randn(experts, 2 * width, hidden, generator=draw).mul_(hidden**-0.5).to(dtype),
        "down": torch.randn(experts, hidden, width, generator=draw).mul_(width**-0.5).to(dtype),
    }
    return LayerInputs(
        hidden_states=tokens.to(device),
        output_gradient=torch.randn(tokens.shape, generator=draw).to(device, dtype),
        weights={name: weight.to(device) for name, weight in weights.items()},
        tokens_per_expert=torch.bincount(chosen.flatten(), minlength=experts),
    )


def _skewed(case: LayerCase, router: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    words = torch.randn(_WORDS, case.hidden_size, generator=draw)
    words += _COMMON * torch.randn(case.hidden_size, generator=draw)
    frequencies = 1 / torch.arange(1, _WORDS + 1)
    kept, missing = [], case.tokens
    while missing > 0:
        chosen = torch.multinomial(frequencies, case.tokens, replacement=True, generator=draw)
        tokens = words[chosen] + _PLACE * torch.randn(case.tokens, case.hidden_size, generator=draw)
        best = (tokens @ router.t()).topk(min(case.top_k + 1, case.num_experts)).values
        clear = tokens if best.shape[1] == case.top_k else tokens[best[:, -2] - best[:, -1] > _MARGIN]
        kept.append(clear[:missing])
        missing -= len(kept[-1])
    return torch.cat(kept)


def _balanced(case: LayerCase, router: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Draw tokens whose logits are as random as those of others, but largest where it is an expert's turn."""
    tokens, experts = case.tokens, case.num_experts
    logits = torch.randn(tokens, experts, generator=draw).sort(dim=1, descending=True).values
    logits[:, : case.top_k] += 2 * _MARGIN
    order = torch.rand(tokens, experts, generator=draw)
    # Consecutive experts, so that T K assignments go around all of them; the order of the others is random.
    turn = (torch.arange(tokens)[:, None] * case.top_k + torch.arange(case.top_k)) % experts
    order.scatter_(1, turn, torch.arange(-case.top_k, 0).float().expand(tokens, -1))
    wanted = torch.empty_like(logits).scatter_(1, order.argsort(dim=1), logits)
    noise = torch.randn(tokens, case.hidden_size, generator=draw)
    back = torch.linalg.pinv(router)
    return noise + (wanted - noise @ router.t()) @ back.t()
