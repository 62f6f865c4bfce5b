"""Training without any of the machinery under test: one process, plain PyTorch, formulas written out.

It shares the model's forward pass with the package (checked against Transformers' own models elsewhere) but none of
its losses, reductions, accumulation, clipping, optimizer grouping or schedule.
"""

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


@dataclass
class Trajectory:
    """What a run gives: losses and gradient norms by step, and the weights at the end."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    largest_loads: list[float] = field(default_factory=list)


def train(model: MoEForCausalLM, recipe: Recipe, dtype: torch.dtype = torch.float32, pieces: int = 1) -> Trajectory:
    """Run the recipe and return its trajectory.

    With a 16-bit `dtype` the forward and backward pass see rounded weights, and the optimizer the float32 ones.
    Rounding depends on the shapes that are multiplied, and tips tokens from one expert to another: `pieces` > 1 sends
    each micro-batch through the model in as many pieces as there are ranks.
    """
    result = Trajectory()
    # As mixed precision does: the float32 weights begin as the rounded ones.
    masters = {name: parameter.data.to(dtype).float() for name, parameter in model.named_parameters()}
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        eps=recipe.adam_epsilon,
        fused=True,
    )
    rows = iter(recipe.rows)
    for step in range(recipe.num_steps):
        size = recipe.rows_per_micro_batch // pieces
        micro_batches = [
            [_collate([next(rows) for _ in range(size)]) for _ in range(pieces)]
            for _ in range(recipe.micro_batches_per_step)
        ]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 - step / recipe.num_steps)
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.data = masters[name].to(dtype)
        loss = _loss_of_step(model, micro_batches, recipe, result)
        loss.backward()
        gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.data = masters[name]
            parameter.grad = gradients[name]
        norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
        if norm > recipe.max_grad_norm:
            for parameter in model.parameters():
                parameter.grad.mul_(recipe.max_grad_norm / norm)
        optimizer.step()
        masters = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
        result.losses.append(loss.item())
        result.grad_norms.append(norm.item())
    result.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return result


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


def _loss_of_step(model, micro_batches: list[list[dict]], recipe: Recipe, result: Trajectory) -> torch.Tensor:
    every_piece = [piece for pieces in micro_batches for piece in pieces]
    num_items = sum((piece["labels"][:, 1:] != -100).sum().item() for piece in every_piece)
    num_tokens = sum(piece["attention_mask"].sum().item() for piece in every_piece)
    total = torch.zeros(())
    for pieces in micro_batches:
        router_logits = []
        for piece in pieces:
            output = model(
                input_ids=piece["input_ids"], attention_mask=piece["attention_mask"], output_router_logits=True
            )
            summed = F.cross_entropy(
                output.logits[:, :-1].float().reshape(-1, output.logits.shape[-1]),
                piece["labels"][:, 1:].reshape(-1),
                ignore_index=-100,
                reduction="sum",
            )
            total = total + summed / num_items
            kept = piece["attention_mask"].reshape(-1).bool()
            router_logits.append([logits[kept] for logits in output.router_logits])
        for of_layer in zip(*router_logits, strict=True):
            logits = torch.cat(of_layer)
            aux, z, largest_load = _router_terms(logits, model.config.num_experts_per_tok)
            total = total + len(logits) / num_tokens * (recipe.aux_coef * aux + recipe.z_coef * z)
            result.largest_loads.append(largest_load)
    return total


def _router_terms(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Balancing and z-loss of one layer over the tokens of one global micro-batch, expert by expert."""
    num_tokens, num_experts = logits.shape
    probs = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    chosen = probs.argsort(dim=1, descending=True)[:, :top_k]
    loads = [(chosen == expert).sum().item() / (num_tokens * top_k) for expert in range(num_experts)]
    aux = num_experts * sum(load * probs[:, expert].mean() for expert, load in enumerate(loads))
    z = torch.log(torch.exp(logits).sum(dim=1)).pow(2).mean()
    return aux, z, max(loads) * num_experts
