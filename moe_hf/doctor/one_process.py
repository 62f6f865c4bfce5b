"""The same training in one process and plain PyTorch: what the distributed run is compared with.

It shares the model's forward pass and its losses with the package, and nothing of what the self-test is about: no
Trainer, no DeepSpeed, no process group; data order, reduction, clipping, optimizer and schedule are written out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM
from ..training.bias_update import RouterBiasUpdater


@dataclass(frozen=True)
class Recipe:
    """What a run is given: its batches, and the numbers of its optimizer."""

    num_steps: int
    micro_batches_per_step: int
    data_ranks: int
    rows_per_rank: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    # Adam divides a gradient by its own size: at 1e-8 an element whose gradient is rounding noise moves by a full step
    # in either direction, and a comparison would be of noise.
    adam_epsilon: float = 1e-5
    max_grad_norm: float = 1.0

    @property
    def num_rows(self) -> int:
        """Rows that the whole run reads."""
        return self.num_steps * self.micro_batches_per_step * self.data_ranks * self.rows_per_rank


@dataclass
class Trajectory:
    """What a run gives: losses and gradient norms by step, and the weights at the end."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train_in_one_process(model: MoEForCausalLM, rows: list[dict], recipe: Recipe) -> Trajectory:
    """Train `model` in float32 on `rows` in their order, and return its trajectory."""
    result, rows = Trajectory(), iter(rows)
    model.train()
    parameters = dict(model.named_parameters())
    plain = {name for name in parameters if "norm" in name or name.endswith("bias")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in parameters.items() if n not in plain], "weight_decay": recipe.weight_decay},
            {"params": [p for n, p in parameters.items() if n in plain], "weight_decay": 0.0},
        ],
        eps=recipe.adam_epsilon,
    )
    biases = RouterBiasUpdater(model)
    for step in range(recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 - step / recipe.num_steps)
        optimizer.zero_grad()
        result.losses.append(_backward(model, _batches_of_step(rows, recipe, model.config)))
        result.grad_norms.append(_clip(list(parameters.values()), recipe.max_grad_norm))
        optimizer.step()
        biases.step()
    result.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return result


def routes_by_rank(config: MoEConfig) -> bool:
    """Return whether routing looks at the tokens that one rank has at a time, so that batches cannot be joined."""
    return config.num_sparse_layers > 0 and (
        config.router_aux_loss_scope == "local"
        or config.router_balancing in ("sinkhorn", "expert_choice")
        or config.expert_capacity_factor is not None
    )


def _batches_of_step(rows, recipe: Recipe, config: MoEConfig) -> list[dict[str, torch.Tensor]]:
    """Return what goes through the model at once: a micro-batch of all ranks, or of one where that matters."""
    pieces = recipe.data_ranks if routes_by_rank(config) else 1
    size = recipe.data_ranks * recipe.rows_per_rank // pieces
    return [_collate([next(rows) for _ in range(size)]) for _ in range(recipe.micro_batches_per_step * pieces)]


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def _backward(model: MoEForCausalLM, batches: list[dict]) -> float:
    """Add up the gradients of one step's batches; return their loss, a mean over its labels and tokens."""
    num_items = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches)
    num_tokens = sum(batch["attention_mask"].sum().item() for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_items, num_tokens_in_batch=num_tokens).loss
        loss.backward()
        total += loss.item()
    return total


def _clip(parameters: list[torch.nn.Parameter], limit: float) -> float:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm
