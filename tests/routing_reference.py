"""Slow references of every way to route, written from the papers' formulas as loops over tokens and experts.

Letters: T tokens, E experts, K experts of a token, C an expert's capacity, H the model's and I an expert's width.
Everything is float64. Choices are plain lists; weights and losses are tensors, so that autograd can give the gradients
that a fixed choice has. Nothing below calls the code under test.
"""

import math
from dataclasses import dataclass

import torch
from helpers_model import tiny_config
from oracle import choose_experts

from moe_hf import MoEConfig


@dataclass(frozen=True)
class Routes:
    """What a router decides for T tokens: `weights` `(T, K)`, and its experts, drops and loads as lists."""

    weights: torch.Tensor
    index: list[list[int]]
    dropped: list[list[bool]]
    tokens_per_expert: list[int]


def token_scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Return one token's scores `(E,)`: `exp(x_e) / sum exp(x_i)`, or `1 / (1 + exp(-x_e))`."""
    if scoring_func == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    exponentials = torch.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def token_weights(logits: torch.Tensor, chosen: list[int], config) -> torch.Tensor:
    """Return the weights `(K,)` of one token's chosen experts, before `routed_scaling_factor`."""
    if config.topk_before_softmax:
        return token_scores(logits[chosen], "softmax")
    scores = token_scores(logits, config.scoring_func)[chosen]
    return scores / scores.sum() if config.norm_topk_prob else scores


def sinkhorn_plan(logits: torch.Tensor, num_rounds: int = 10_000) -> torch.Tensor:
    """Scale the rows and columns of `exp(logits)` in turn until every row sums to 1 and every column to T / E."""
    num_tokens, num_experts = logits.shape
    rows = [[math.exp(x - max(row)) for x in row] for row in logits.tolist()]
    for _ in range(num_rounds):
        rows = [[x / sum(row) for x in row] for row in rows]
        columns = [sum(row[expert] for row in rows) for expert in range(num_experts)]
        rows = [[x / total * num_tokens / num_experts for x, total in zip(row, columns, strict=True)] for row in rows]
        if all(abs(sum(row) - 1) < 1e-12 for row in rows):
            return torch.tensor(rows, dtype=torch.float64)
    raise AssertionError("the rows and columns of this matrix cannot be scaled so")


def expert_capacity(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    return math.ceil(factor * num_tokens * top_k / num_experts)


def dropped_slots(
    weights: list[list[float]], index: list[list[int]], num_experts: int, capacity: int, policy: str
) -> list[list[bool]]:
    """Tell which of the `(T, K)` assignments an expert of this capacity cannot take.

    Experts are filled in the order of GShard's algorithm 1, all first choices before all second ones, or by weight.
    """
    top_k = len(index[0]) if index else 0
    queue = [(token, slot) for slot in range(top_k) for token in range(len(index))]
    if policy == "probability":
        queue.sort(key=lambda place: -weights[place[0]][place[1]])
    dropped = [[False] * top_k for _ in index]
    taken = [0] * num_experts
    for token, slot in queue:
        expert = index[token][slot]
        if taken[expert] < capacity:
            taken[expert] += 1
        else:
            dropped[token][slot] = True
    return dropped


def route(logits: torch.Tensor, config, training: bool = False, bias: list[float] | None = None) -> Routes:
    """Route T tokens by their `logits` `(T, E)`, as `config` says, each token to K experts."""
    num_tokens, num_experts = logits.shape
    rankings = [token_scores(row.detach(), config.scoring_func).tolist() for row in logits]
    if training and config.router_balancing == "sinkhorn" and num_tokens:
        rankings = sinkhorn_plan(logits.detach()).tolist()
    index = [choose_experts(ranking, bias or [0.0] * num_experts, config) for ranking in rankings]
    weights = [token_weights(row, chosen, config) for row, chosen in zip(logits, index, strict=True)]

    dropped = [[False] * config.num_experts_per_tok for _ in index]
    if training and config.expert_capacity_factor is not None:
        capacity = expert_capacity(config.expert_capacity_factor, num_tokens, config.num_experts_per_tok, num_experts)
        dropped = dropped_slots(
            [row.tolist() for row in weights], index, num_experts, capacity, config.token_drop_policy
        )
    kept = 1.0 - torch.tensor(dropped, dtype=torch.float64).reshape(num_tokens, config.num_experts_per_tok)
    stacked = torch.stack(weights) if weights else logits.new_zeros(0, config.num_experts_per_tok)
    chosen = [expert for experts in index for expert in experts]
    loads = [chosen.count(expert) for expert in range(num_experts)]
    return Routes(stacked * kept * config.routed_scaling_factor, index, dropped, loads)


def expert_choice(logits: torch.Tensor, config) -> list[dict[int, torch.Tensor]]:
    """Return, for every expert, the tokens it takes and their weights (Zhou et al. 2022, section 3.2)."""
    num_tokens, num_experts = logits.shape
    factor = 1.0 if config.expert_capacity_factor is None else config.expert_capacity_factor
    capacity = max(1, expert_capacity(factor, num_tokens, config.num_experts_per_tok, num_experts))
    scores = [token_scores(row, config.scoring_func) for row in logits]
    taken = []
    for expert in range(num_experts):
        ranking = sorted(range(num_tokens), key=lambda token: scores[token][expert].item(), reverse=True)
        best = ranking[: min(capacity, num_tokens)]
        taken.append({token: scores[token][expert] * config.routed_scaling_factor for token in best})
    return taken


# --------------------------------------------------------------------------------------------------------------------
# The block


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gated = gate @ x
    return down @ (gated / (1 + torch.exp(-gated)) * (up @ x))


def sparse_block(parameters: dict[str, torch.Tensor], tokens: torch.Tensor, config, training: bool) -> torch.Tensor:
    """Return the output `(T, H)` of a sparse block with these float64 parameters, token by token."""
    logits = torch.stack([parameters["gate.weight"] @ x for x in tokens])
    if config.router_balancing == "expert_choice":
        taken = expert_choice(logits, config)
        pairs = [
            (token, expert, weight) for expert, tokens_of in enumerate(taken) for token, weight in tokens_of.items()
        ]
    else:
        routes = route(logits, config, training)
        pairs = [
            (token, expert, routes.weights[token, slot])
            for token, experts in enumerate(routes.index)
            for slot, expert in enumerate(experts)
        ]
    outputs = [torch.zeros_like(x) + shared_expert(parameters, x, config) for x in tokens]
    width = config.moe_intermediate_size
    for token, expert, weight in pairs:
        gate_up, down = parameters["experts.gate_up_proj"][expert], parameters["experts.down_proj"][expert]
        outputs[token] = outputs[token] + weight * swiglu(tokens[token], gate_up[:width], gate_up[width:], down)
    return torch.stack(outputs)


def shared_expert(parameters: dict[str, torch.Tensor], x: torch.Tensor, config) -> torch.Tensor | float:
    if not config.shared_expert_intermediate_size:
        return 0.0
    output = swiglu(x, *(parameters[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
    if config.shared_expert_gate:
        output = output / (1 + torch.exp(-(parameters["shared_experts_gate.weight"][0] @ x)))
    return output


# --------------------------------------------------------------------------------------------------------------------
# The loss of a sequence


def sequence_aux_loss(
    logits: torch.Tensor,
    index: list[list[int]],
    token_mask: list[list[bool]],
    scoring_func: str = "softmax",
    num_tokens_in_batch: int | None = None,
) -> torch.Tensor:
    """Return DeepSeek-V3's balancing loss, equations 17 to 20 without alpha, of `(B, S)` tokens in a flat `(B * S, E)`.

    A sequence counts by its share of the batch's unmasked tokens.
    """
    num_experts, top_k = logits.shape[-1], len(index[0])
    length = len(token_mask[0])
    num_tokens_in_batch = num_tokens_in_batch or sum(sum(row) for row in token_mask)
    loss = torch.zeros((), dtype=torch.float64)
    for sequence, row in enumerate(token_mask):
        tokens = [sequence * length + position for position, keep in enumerate(row) if keep]
        for expert in range(num_experts):
            count = sum(index[token].count(expert) for token in tokens)
            for token in tokens:
                scores = token_scores(logits[token], scoring_func)
                load = num_experts / (top_k * len(tokens)) * count
                probability = scores[expert] / scores.sum() / len(tokens)
                loss = loss + load * probability * len(tokens) / num_tokens_in_batch
    return loss


# --------------------------------------------------------------------------------------------------------------------
# What the tests share

HIDDEN_SIZE = 8


def routing_config(**changes) -> MoEConfig:
    """Describe a small sparse block: six experts, of which a token visits two."""
    return tiny_config(
        **{"hidden_size": HIDDEN_SIZE, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2} | changes
    )


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter from N(0, 1): blocks start small, which hides what goes missing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def check_router(router: torch.nn.Module, config, tokens: torch.Tensor, bias: list[float] | None = None) -> Routes:
    """Compare everything a `MoERouter` gives for these tokens with `route`: outputs, what its tap sees, gradients."""
    seen = []
    handle = router.tap.register_forward_pre_hook(lambda module, args: seen.append(args))
    tokens = tokens.clone().requires_grad_()
    weights, index, counts = router(tokens)
    handle.remove()
    [(logits, tapped_index, dropped)] = seen

    exact = [tensor.detach().double().requires_grad_() for tensor in (tokens, router.weight)]
    expected_logits = exact[0] @ exact[1].T
    expected = route(expected_logits, config, router.training, bias)
    assert [weights.dtype, index.dtype, counts.dtype] == [torch.float32, torch.int64, torch.int32]
    assert index.tolist() == expected.index == tapped_index.tolist()
    assert counts.tolist() == expected.tokens_per_expert
    torch.testing.assert_close(logits.detach().double(), expected_logits.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.detach().double(), expected.weights.detach(), rtol=1e-5, atol=0.0)
    if router.training and config.expert_capacity_factor is not None:
        assert dropped.dtype == torch.bool and dropped.tolist() == expected.dropped
    else:
        assert dropped is None

    factors = random(*weights.shape, seed=99)
    gradients = torch.autograd.grad((weights * factors).sum(), (tokens, router.weight))
    wanted = torch.autograd.grad((expected.weights * factors).sum(), exact)
    for gradient, exact_gradient in zip(gradients, wanted, strict=True):
        # One normalised weight is always 1 and has no gradient but rounding.
        size = max(exact_gradient.abs().max().item(), 0.1)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0.0, atol=1e-5 * size)
    return expected
