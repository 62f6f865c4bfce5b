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


def train(model: MoEForCausalLM, recipe: Recipe) -> Trajectory:
    """Run the recipe and return its trajectory."""
    result = Trajectory()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        fused=True,
    )
    rows = iter(recipe.rows)
    for step in range(recipe.num_steps):
        micro_batches = [
            _collate([next(rows) for _ in range(recipe.rows_per_micro_batch)])
            for _ in range(recipe.micro_batches_per_step)
        ]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 - step / recipe.num_steps)
        optimizer.zero_grad()
        loss = _loss_of_step(model, micro_batches, recipe, result)
        loss.backward()
        norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
        if norm > recipe.max_grad_norm:
            for parameter in model.parameters():
                parameter.grad.mul_(recipe.max_grad_norm / norm)
        optimizer.step()
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


def _loss_of_step(model, micro_batches: list[dict], recipe: Recipe, result: Trajectory) -> torch.Tensor:
    num_items = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in micro_batches)
    num_tokens = sum(batch["attention_mask"].sum().item() for batch in micro_batches)
    total = torch.zeros(())
    for batch in micro_batches:
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        )
        summed = F.cross_entropy(
            output.logits[:, :-1].reshape(-1, output.logits.shape[-1]),
            batch["labels"][:, 1:].reshape(-1),
            ignore_index=-100,
            reduction="sum",
        )
        total = total + summed / num_items
        kept = batch["attention_mask"].reshape(-1).bool()
        share = kept.sum().item() / num_tokens
        for logits in output.router_logits:
            aux, z, largest_load = _router_terms(logits[kept], model.config.num_experts_per_tok)
            total = total + share * (recipe.aux_coef * aux + recipe.z_coef * z)
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
