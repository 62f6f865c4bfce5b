"""Output folders of runs that never were: a metrics.jsonl of plausible curves, and the configuration of the model.

How well a method balances is made up, but what follows from a load (MaxVio, entropy, …) is computed from it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FAMILIES = ("attention", "dense_mlp", "experts", "router", "embeddings", "norms")

# Standard deviation of the logarithms of the loads, at the beginning and at the end of training.
IMBALANCE = {"aux_loss": (0.7, 0.08), "loss_free": (0.7, 0.03), "sinkhorn": (0.3, 0.05), "none": (0.7, 1.6)}


@dataclass
class MadeUpRun:
    """What a made-up run is like.

    Attributes:
        balancing: a `router_balancing`, or `"dense"`.
        sparse_layers: their indices among `num_layers`.
        num_experts: of each sparse layer.
        capacity: the `expert_capacity_factor`, or none.
        num_entries: training entries, one every `logging_steps` steps.
        tokens_per_step: unmasked tokens.
        loss_shift: added to the loss.
        seed: of all that is random.
        old: log only what the first versions logged: no tokens, no loads, nothing about balance.
    """

    balancing: str = "aux_loss"
    sparse_layers: tuple[int, ...] = (1, 3)
    num_layers: int = 4
    num_experts: int = 8
    capacity: float | None = None
    num_entries: int = 50
    logging_steps: int = 10
    tokens_per_step: int = 65_536
    loss_shift: float = 0.0
    seed: int = 0
    old: bool = False

    def __post_init__(self) -> None:
        if self.balancing == "dense":
            self.sparse_layers, self.num_experts = (), 0
        self._random = np.random.default_rng(self.seed)
        self._taste = self._random.standard_normal((len(self.sparse_layers), self.num_experts))

    def config(self) -> dict:
        """Return what an exported config.json says of the router."""
        return {
            "model_type": "moe_hf",
            "num_hidden_layers": self.num_layers,
            "num_experts": self.num_experts,
            "mlp_layer_types": ["sparse" if i in self.sparse_layers else "dense" for i in range(self.num_layers)],
            "router_balancing": "aux_loss" if self.balancing == "dense" else self.balancing,
            "router_aux_loss_scope": "global",
            "expert_capacity_factor": self.capacity,
            "token_drop_policy": "position",
        }

    def entries(self) -> list[dict]:
        """Return all entries in the order in which they are logged."""
        entries = []
        for number in range(1, self.num_entries + 1):
            entries.append(self.training_entry(number))
            if number % max(1, self.num_entries // 10) == 0:
                entries.append(self.evaluation_entry(number))
        return [*entries, {"step": number * self.logging_steps, "train_runtime": 1234.5, "train_loss": 3.2}]

    def training_entry(self, number: int) -> dict:
        """Return the entry of the `number`-th time that training logs, from 1."""
        progress = number / self.num_entries
        ce_loss = self._loss(number) + 0.02 * self._random.standard_normal()
        norm = 0.4 + 3 * math.exp(-30 * progress) + 0.05 * self._random.random()
        entry = {
            **self._place(number),
            "loss": ce_loss + 0.02,
            "ce_loss": ce_loss,
            "grad_norm": norm,
            "learning_rate": 3e-4 * min(1, 20 * progress) * (0.55 + 0.45 * math.cos(math.pi * progress)),
            "tokens_per_second": 41_000 * (1 + 0.02 * self._random.standard_normal()),
            "skipped_steps": 0,
        }
        if not self.old:
            entry |= self._gradients(norm) | self._sinks(progress)
            entry |= {"mfu": entry["tokens_per_second"] / 130_000, "peak_memory_gib": 61.5 + 2 * min(progress, 0.1)}
        return entry | self._router(progress, entry["loss"], "", number)

    def evaluation_entry(self, number: int) -> dict:
        """Return the entry of an evaluation after the `number`-th training entry."""
        loss = self._loss(number) + 0.03
        entry = {**self._place(number), "eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_runtime": 3.2}
        return entry | self._router(number / self.num_entries, loss, "eval_", number)

    def loads(self, progress: float) -> np.ndarray:
        """Return shares of the assignments, of shape (L, E)."""
        first, last = IMBALANCE.get(self.balancing, (0, 0))
        width = last + (first - last) * math.exp(-6 * progress)
        noise = self._random.standard_normal(self._taste.shape)
        loads = np.exp(width * (0.9 * self._taste + 0.4 * noise) + 0.03 * noise)
        if self.balancing == "none":
            loads[:, : self.num_experts // 8] *= progress < 0.4  # they die
        return loads / loads.sum(axis=1, keepdims=True) if loads.size else loads

    def _loss(self, number: int) -> float:
        tokens = number * self.logging_steps * self.tokens_per_step
        return 2.1 + self.loss_shift + 8.5 * (1 + tokens / 3e5) ** -0.55

    def _place(self, number: int) -> dict:
        step = number * self.logging_steps
        place = {"step": step, "epoch": step / 1000}
        return place if self.old else place | {"num_tokens": step * self.tokens_per_step}

    def _gradients(self, norm: float) -> dict:
        shares = (
            np.array([0.3, 0.1, 0.35, 0.02, 0.2, 0.03]) if self.num_experts else np.array([0.3, 0.45, 0, 0, 0.2, 0.05])
        )
        return {
            f"grad_norm/{family}": norm * math.sqrt(share / shares.sum())
            for family, share in zip(FAMILIES, shares, strict=True)
            if share
        }

    def _sinks(self, progress: float) -> dict:
        depth = np.arange(self.num_layers) / max(1, self.num_layers - 1)
        sinks = (0.02 + 0.5 * depth**0.7 * (1 - np.exp(-5 * progress))) * (
            1 + 0.03 * self._random.random(self.num_layers)
        )
        return {f"attention_sink/layer_{i}": sink for i, sink in enumerate(sinks)} | {"attention_sink": sinks.mean()}

    def _router(self, progress: float, loss: float, prefix: str, number: int) -> dict:
        """Return what is logged of the routers, with what follows from a load computed as its definition says."""
        if not self.sparse_layers:
            return {}
        loads = self.loads(progress)
        mean = loads.mean(axis=1)
        logs = np.log(np.where(loads > 0, loads, 1))
        of_layers = {
            "max_vio": loads.max(axis=1) / mean - 1,
            "load_cv": loads.std(axis=1) / mean,
            "load_entropy": -(loads * logs).sum(axis=1) / math.log(self.num_experts),
            "dead_experts": (loads == 0).sum(axis=1),
        }
        if not prefix:
            aux = self.num_experts * (loads**2).sum(axis=1)
            z = 8 * math.exp(-4 * progress) + 0.5 + 0.1 * np.arange(len(loads))
            of_layers |= {"aux_loss": aux, "z_loss": z}
            if not self.old:
                spread = np.arange(len(loads)) / 40
                of_layers |= {
                    "router_entropy": 0.95 - 0.4 * progress - spread / 8,
                    "router_logit_max": 4 + 9 * progress + spread,
                }
        totals = {"max_vio": "mean", "load_entropy": "mean", "dead_experts": "sum", "aux_loss": "sum", "z_loss": "sum"}
        if self.capacity and not prefix:
            of_layers["dropped_fraction"] = np.maximum(loads - self.capacity * mean[:, None], 0).sum(axis=1)
            totals["dropped_fraction"] = "mean"
        if self.balancing == "loss_free" and not prefix:
            of_layers["router_bias_max"] = 0.2 * progress + 0.01 * np.arange(len(loads))
            of_layers["router_bias_min"] = -of_layers["router_bias_max"] / 2
        if self.old:
            of_layers = {key: of_layers[key] for key in ("aux_loss", "z_loss") if key in of_layers}
        entry = {
            f"{prefix}{key}/layer_{layer}": float(value)
            for key, values in of_layers.items()
            for layer, value in zip(self.sparse_layers, values, strict=True)
        }
        entry |= {
            f"{prefix}{key}": float(getattr(of_layers[key], how)()) for key, how in totals.items() if key in of_layers
        }
        if not self.old:
            shares = {f"layer_{i}": row.round(6).tolist() for i, row in zip(self.sparse_layers, loads, strict=True)}
            entry[f"{prefix}expert_load"] = shares
        return entry


def write_run(folder: Path, run: MadeUpRun) -> Path:
    """Write the output folder of a run: its metrics and the configuration of its export."""
    write_entries(folder, run.entries())
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(run.config()))
    return folder


def write_entries(folder: Path, entries: list[dict]) -> Path:
    """Write a `metrics.jsonl` of these entries into a new folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def several_kinds() -> dict[str, MadeUpRun]:
    """Return six runs of different kinds, by the name of their folder."""
    return {
        "aux_loss": MadeUpRun(loss_shift=0.02),
        "loss_free": MadeUpRun("loss_free", loss_shift=-0.01, seed=1),
        "sinkhorn-capacity-1.25": MadeUpRun("sinkhorn", capacity=1.25, loss_shift=0.04, seed=2),
        "no-balancing": MadeUpRun("none", loss_shift=0.12, seed=3),
        "dense": MadeUpRun("dense", loss_shift=0.25, seed=4),
        "loss_free-16-experts-a-run-with-a-really-long-name-of-its-settings-lr3e-4-wd0.1-seed1234": MadeUpRun(
            "loss_free", sparse_layers=(0, 1, 2, 3), num_experts=16, num_entries=35, loss_shift=-0.03, seed=5
        ),
    }
