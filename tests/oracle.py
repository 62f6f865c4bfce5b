"""Training without any of the machinery under test: one process, plain PyTorch, formulas written out.

It shares the model's forward pass with the package (checked against Transformers' own models elsewhere) but none of
its losses, reductions, accumulation, clipping, optimizer grouping or schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from moe_hf import MoEForCausalLM


@dataclass
class Recipe:
    """What a run is given: the batches, and the numbers of its optimizer."""

    rows: list[dict]
    num_steps: int
    micro_batches_per_step: int
    rows_per_micro_batch: int
    learning_rate: float
    weight_decay: float
    adam_epsilon: float
    max_grad_norm: float
    aux_coef: float
    z_coef: float
    # What the routers' biases move by at every step; 0 where there are none.
    bias_update_speed: float = 0.0
    # Share of the uniform distribution in the targets, and weight of the predictions' squared logsumexp.
    label_smoothing: float = 0.0
    output_z_coef: float = 0.0


@dataclass
class Trajectory:
    """What a run gives: losses and gradient norms by step, and the weights at the end."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    family_norms: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    largest_loads: list[float] = field(default_factory=list)
    # Of the predictions, means over the labels without a weight: (smoothed) cross-entropy, squared logsumexp.
    cross_entropies: list[float] = field(default_factory=list)
    output_z_losses: list[float] = field(default_factory=list)
    # For each step and sparse layer what `describe_routing` returns; and the unmasked tokens seen up to each step.
    routing: list[list[dict]] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)


def train(
    model: MoEForCausalLM,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
    pieces: int = 1,
    make_optimizer: Callable[[MoEForCausalLM], torch.optim.Optimizer] | None = None,
) -> Trajectory:
    """Run the recipe and return its trajectory.

    With a 16-bit `dtype` the forward and backward pass see rounded weights, and the optimizer the float32 ones.
    `pieces` > 1 sends each micro-batch through the model in as many pieces as there are ranks: for methods that look at
    the tokens of one rank together, and because rounding depends on the shapes that are multiplied, and tips tokens
    from one expert to another. `make_optimizer` puts another one in the place of AdamW.
    """
    result = Trajectory()
    # As mixed precision does: the float32 weights begin as the rounded ones.
    masters = {name: parameter.data.to(dtype).float() for name, parameter in model.named_parameters()}
    plain = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    decayed = [p for n, p in model.named_parameters() if not ("norm" in n or "bias" in n)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        eps=recipe.adam_epsilon,
        fused=True,
    )
    if make_optimizer is not None:
        optimizer = make_optimizer(model)
    starting_rates = [group["lr"] for group in optimizer.param_groups]
    rows = iter(recipe.rows)
    for step in range(recipe.num_steps):
        size = recipe.rows_per_micro_batch // pieces
        micro_batches = [
            [_collate([next(rows) for _ in range(size)]) for _ in range(pieces)]
            for _ in range(recipe.micro_batches_per_step)
        ]
        for group, rate in zip(optimizer.param_groups, starting_rates, strict=True):
            group["lr"] = rate * (1 - step / recipe.num_steps)
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.data = masters[name].to(dtype)
        loss, assignments = _loss_of_step(model, micro_batches, recipe, result)
        loss.backward()
        gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.data = masters[name]
            parameter.grad = gradients[name]
        norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
        result.family_norms.append(_family_norms(gradients))
        if norm > recipe.max_grad_norm:
            for parameter in model.parameters():
                parameter.grad.mul_(recipe.max_grad_norm / norm)
        optimizer.step()
        masters = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
        for bias, chosen in zip(_biases(model), assignments, strict=True):
            move_bias(bias, chosen, recipe.bias_update_speed)
        result.losses.append(loss.item())
        result.grad_norms.append(norm.item())
    result.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return result


def _family_norms(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    squares = dict.fromkeys(("attention", "dense_mlp", "experts", "router", "embeddings", "norms"), 0.0)
    for name, gradient in gradients.items():
        squares[_family(name)] += gradient.double().square().sum().item()
    return {family: math.sqrt(square) for family, square in squares.items()}


def _family(name: str) -> str:
    if name.endswith("norm.weight"):
        return "norms"
    rest = {".self_attn.": "attention", ".experts.": "experts", ".mlp.gate.": "router", ".mlp.": "dense_mlp"}
    return next((family for part, family in rest.items() if part in name), "embeddings")


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    if "position_ids" in rows[0]:
        fill["position_ids"] = 0
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


def _loss_of_step(
    model, micro_batches: list[list[dict]], recipe: Recipe, result: Trajectory
) -> tuple[torch.Tensor, list[list[int]]]:
    """Return the loss of the whole batch and, for each router with a bias, the expert of every assignment."""
    every_piece = [piece for pieces in micro_batches for piece in pieces]
    num_items = sum((piece["labels"][:, 1:] != -100).sum().item() for piece in every_piece)
    num_tokens = sum(piece["attention_mask"].sum().item() for piece in every_piece)
    total, cross_entropy, z_loss = torch.zeros(3)
    biases = _biases(model)
    assignments: list[list[int]] = [[] for _ in biases]
    routed: list[list] = [[] for _ in range(model.config.num_sparse_layers)]
    for pieces in micro_batches:
        router_logits = []
        for piece in pieces:
            # Packed rows have no padding: only without a mask and a cache do positions tell where documents begin.
            seen = "position_ids" if "position_ids" in piece else "attention_mask"
            ids = piece["input_ids"]
            output = model(input_ids=ids, **{seen: piece[seen]}, use_cache=False, output_router_logits=True)
            ce, z = _prediction_terms(output.logits[:, :-1].float(), piece["labels"][:, 1:], recipe.label_smoothing)
            total = total + (ce + recipe.output_z_coef * z) / num_items
            cross_entropy, z_loss = cross_entropy + ce.detach() / num_items, z_loss + z.detach() / num_items
            router_logits.append(
                [_balanced_together(logits, piece["attention_mask"], model.config) for logits in output.router_logits]
            )
        for layer, of_layer in enumerate(zip(*router_logits, strict=True)):
            parts = [part for parts in of_layer for part in parts]
            if model.config.router_aux_loss_scope == "global":
                parts = [torch.cat(parts)]
            for logits in parts:
                chosen = choose_for_all(logits, biases[layer] if biases else None, model.config)
                aux, z, largest_load = _router_terms(logits, chosen, model.config.scoring_func)
                total = total + len(logits) / num_tokens * (recipe.aux_coef * aux + recipe.z_coef * z)
                result.largest_loads.append(largest_load)
                routed[layer].append((logits.detach(), chosen))
                if biases:
                    assignments[layer] += [expert for experts in chosen for expert in experts]
    result.routing.append([describe_routing(of_layer, model.config) for of_layer in routed])
    result.cross_entropies.append(cross_entropy.item())
    result.output_z_losses.append(z_loss.item())
    result.num_tokens.append(num_tokens + (result.num_tokens[-1] if result.num_tokens else 0))
    return total, assignments


def _prediction_terms(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and squared logsumexp, summed over the labels."""
    valid = labels != -100
    logits, labels = logits[valid], labels[valid]
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return cross_entropy, logits.logsumexp(dim=-1).square().sum()


def _balanced_together(logits: torch.Tensor, mask: torch.Tensor, config) -> list[torch.Tensor]:
    """Return the logits `(T, E)` of the unmasked tokens, in as many pieces as are balanced by themselves."""
    rows = logits.unflatten(0, mask.shape)
    sequences = [row[kept.bool()] for row, kept in zip(rows, mask, strict=True)]
    return sequences if config.router_aux_loss_scope == "sequence" else [torch.cat(sequences)]


def describe_routing(routed: list[tuple[torch.Tensor, list[list[int]]]], config) -> dict:
    """Return what a log entry tells of one layer in one step, from the logits and the experts of its tokens."""
    counts, num_tokens, entropy, largest = [0] * config.num_experts, 0, 0.0, 0.0
    for logits, chosen in routed:
        for token, scores, experts in zip(
            logits.tolist(), _scores(logits, config.scoring_func).tolist(), chosen, strict=True
        ):
            num_tokens += 1
            largest = max(largest, *(abs(logit) for logit in token))
            entropy -= sum(score / sum(scores) * math.log(score / sum(scores)) for score in scores)
            for expert in experts:
                counts[expert] += 1
    return {
        "expert_load": [count / sum(counts) for count in counts],
        "max_vio": max(counts) * len(counts) / sum(counts) - 1,
        "router_entropy": entropy / num_tokens / math.log(len(counts)),
        "router_logit_max": largest,
        "dead_experts": counts.count(0),
    }


def _router_terms(
    logits: torch.Tensor, chosen: list[list[int]], scoring_func: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Balancing and z-loss of one layer over the tokens of one global micro-batch, expert by expert."""
    num_experts = logits.shape[1]
    scores = _scores(logits, scoring_func)
    probs = scores / scores.sum(dim=1, keepdim=True)
    assignments = [expert for experts in chosen for expert in experts]
    loads = [assignments.count(expert) / len(assignments) for expert in range(num_experts)]
    aux = num_experts * sum(load * probs[:, expert].mean() for expert, load in enumerate(loads))
    z = torch.log(torch.exp(logits).sum(dim=1)).pow(2).mean()
    return aux, z, max(loads) * num_experts


# --------------------------------------------------------------------------------------------------------------------
# Choosing experts, token by token, and moving biases, expert by expert


def _scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    if scoring_func == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    return torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)


def choose_for_all(logits: torch.Tensor, bias: torch.Tensor | None, config) -> list[list[int]]:
    """Return the experts of every token of `logits` `(T, E)`, best first."""
    scores = _scores(logits.detach(), config.scoring_func).tolist()
    return [choose_experts(row, [0.0] * len(row) if bias is None else bias.tolist(), config) for row in scores]


def choose_experts(scores: list[float], bias: list[float], config) -> list[int]:
    """Return one token's experts, best first: of its best groups, those with the largest score plus bias."""
    ranking = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    groups = [[group * size + i for i in range(size)] for group in range(config.n_group)]

    def worth(group: list[int]) -> float:
        best = sorted((ranking[expert] for expert in group), reverse=True)
        return best[0] if config.group_scoring_func == "max" else sum(best[:2])

    kept = sorted(groups, key=worth, reverse=True)[: config.topk_group]
    eligible = [expert for group in kept for expert in group]
    return sorted(eligible, key=lambda expert: ranking[expert], reverse=True)[: config.num_experts_per_tok]


def move_bias(bias: torch.Tensor, assignments: list[int], speed: float) -> None:
    """Raise the bias `(E,)` of every expert with less than the mean load by `speed`, and lower that with more."""
    mean = len(assignments) / len(bias)
    for expert in range(len(bias)):
        load = assignments.count(expert)
        if load < mean:
            bias[expert] += speed
        elif load > mean:
            bias[expert] -= speed


def _biases(model) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
