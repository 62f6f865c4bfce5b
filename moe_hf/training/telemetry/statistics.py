"""What training reports besides the loss: its parts, the routers' loads and distributions, gradients by family.

Shape letters: L sparse layers, E experts, B sequences of a micro-batch.
"""

import math

import numpy as np
import torch

from ...configuration_moe import MoEConfig
from ...modeling_moe import MoEForCausalLM
from ...modeling_outputs import MoECausalLMOutput
from ...parallel.processes import world_size
from ...parameter_families import FAMILIES
from ...routing import MoERouter
from .balance import balance_of, load_shares, steps_without_tokens
from .loads import LatestLoads
from .reduction import reduce_over_ranks

# What ranks that share matrices have different parts of: gradients, and the attention of their heads.
_SHARED_OUT = ("gradients", "sink_masses", "sink_weights")


class TrainingStatistics:
    """Sums between two log entries, kept on the device until one is due, and then reduced over ranks in one message.

    Loads are counted in every step. What costs more is measured in the steps that are logged and tells of these only:
    the entropy and the largest logit of the routers, gradients by family, the attention on first tokens.

    Args:
        config: of the model.
        loads: is given the experts' loads of every entry.
        shares_are_sums: whether the parts of one batch add up over ranks (`num_items_in_batch` and the number of
            tokens counted over all of them) or are means (and counts) of one rank each.
        dead_expert_steps: an expert without a token in so many steps is dead.
        num_copies: ranks that share matrices, read the same rows and have the same sums of them.

    Attributes:
        num_tokens: unmasked tokens of all ranks since the run's beginning, up to the last entry or `settle_tokens`.
    """

    def __init__(
        self,
        config: MoEConfig,
        loads: LatestLoads,
        *,
        shares_are_sums: bool,
        dead_expert_steps: int,
        num_copies: int = 1,
    ) -> None:
        self._config = config
        self._loads = loads
        self._shares_are_sums = shares_are_sums
        self._dead_expert_steps = dead_expert_steps
        self._num_copies = num_copies
        self._names = [f"layer_{i}" for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
        num_layers, num_experts = len(self._names), config.num_experts if self._names else 0
        self._shapes = {
            "ce_loss": (),
            "output_z_loss": (),
            "aux_loss": (num_layers,),
            "z_loss": (num_layers,),
            "tokens": (),
            "assignments": (num_layers, num_experts),
            "dropped": (num_layers,),
            "entropy": (num_layers,),
            "tokens_with_entropy": (),
            "gradients": (len(FAMILIES),),
            "gradients_measured": (),
            "sink_masses": (config.num_hidden_layers,),
            "sink_weights": (),
        }
        self.num_tokens = 0
        self._idle_steps = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._logit_max: torch.Tensor | None = None
        self._num_steps = 0

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    # ---- collecting: nothing here waits for the device or for other ranks ----

    def add_micro_batch(self, outputs: MoECausalLMOutput, num_tokens: torch.Tensor) -> None:
        """Add one micro-batch of this rank, of so many unmasked tokens."""
        self._add("ce_loss", outputs.ce_loss.float())
        if outputs.output_z_loss is not None:
            self._add("output_z_loss", outputs.output_z_loss.float())
        if outputs.layer_aux_losses is not None:
            self._add("aux_loss", outputs.layer_aux_losses.float())
            self._add("z_loss", outputs.layer_z_losses.float())
        if outputs.tokens_per_expert is not None:
            self._add("assignments", outputs.tokens_per_expert.sum(dim=1))
        if outputs.dropped_assignments is not None:
            self._add("dropped", outputs.dropped_assignments.sum(dim=1))
        if outputs.router_entropy is not None:
            self._add("entropy", outputs.router_entropy.sum(dim=1))
            self._add("tokens_with_entropy", num_tokens)
            largest = outputs.router_logit_max.detach().amax(dim=1)
            self._logit_max = largest if self._logit_max is None else torch.maximum(self._logit_max, largest)

    def add_step(self, num_tokens: torch.Tensor | int) -> None:
        """Count one optimizer step over `num_tokens` unmasked tokens, as many as the losses are means over."""
        self._num_steps += 1
        self._add("tokens", torch.as_tensor(num_tokens))

    def add_gradients(self, squared_norms: torch.Tensor | None) -> None:
        """Add this rank's share of the squared norm of each of `FAMILIES`; `None` where no step was measured."""
        if squared_norms is not None:
            self._add("gradients", squared_norms)
            self._add("gradients_measured", torch.ones(()))

    def add_attention_sink(self, measured: tuple[torch.Tensor, int] | None) -> None:
        """Add what `AttentionSink.pop` returns."""
        if measured is not None:
            self._add("sink_masses", measured[0])
            self._add("sink_weights", torch.tensor(measured[1]))

    # ---- reporting ----

    def pop(self, peak_memory_gib: float) -> dict[str, float]:
        """Return what a log entry tells of the steps since the last call, the same on every rank (a collective call).

        Without a step there is nothing to tell, and what was added stays.

        Args:
            peak_memory_gib: of this rank.
        """
        self._loads.train = None
        if self._num_steps == 0 or "ce_loss" not in self._sums:
            return {}
        device = self._sums["ce_loss"].device
        sums = {
            name: self._sums[name].to(device) if name in self._sums else torch.zeros(shape, device=device)
            for name, shape in self._shapes.items()
        }
        logit_max = torch.zeros(len(self._names), device=device) if self._logit_max is None else self._logit_max
        totals, maxima = reduce_over_ranks(
            sums, {"logits": logit_max, "memory": torch.tensor(peak_memory_gib, dtype=torch.float64)}
        )
        totals |= {name: total / self._num_copies for name, total in totals.items() if name not in _SHARED_OUT}
        self.num_tokens += self._whole(totals["tokens"])
        logs = {"num_tokens": self.num_tokens, **self._losses(totals)}
        if self._names:
            logs |= self._balance(totals) | self._distributions(totals, maxima["logits"])
        logs |= self._gradient_norms(totals) | self._attention_sinks(totals)
        logs["peak_memory_gib"] = float(maxima["memory"])
        self._begin()
        return logs

    def settle_tokens(self) -> None:
        """Bring `num_tokens` up to date between two log entries (a collective call)."""
        if "tokens" not in self._sums:
            return  # on all ranks alike
        tokens = {"tokens": self._sums.pop("tokens")}
        if not self._shares_are_sums:
            totals, _ = reduce_over_ranks(tokens, {})
            tokens = {"tokens": totals["tokens"] / self._num_copies}
        self.num_tokens += int(tokens["tokens"])

    def _whole(self, tokens: np.ndarray) -> int:
        # Where every rank has counted the tokens of all, their sum has them once for each rank.
        return int(tokens) // (self._num_counts if self._shares_are_sums else 1)

    @property
    def _num_counts(self) -> int:
        return world_size() // self._num_copies

    def _by_layer(self, name: str, values: np.ndarray) -> dict[str, float]:
        return {f"{name}/{layer}": float(value) for layer, value in zip(self._names, values, strict=True)}

    def _losses(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        divisor = self._num_steps * (1 if self._shares_are_sums else self._num_counts)
        logs = {name: float(totals[name]) / divisor for name in ("ce_loss", "output_z_loss") if name in self._sums}
        if "aux_loss" in self._sums:
            parts = {name: totals[name] / divisor for name in ("aux_loss", "z_loss")}
            logs |= {name: float(values.sum()) for name, values in parts.items()}
            for name, values in parts.items():
                logs |= self._by_layer(name, values)
        return logs

    def _balance(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        counts, logs = totals["assignments"], {}
        balance = balance_of(counts)
        self._idle_steps = steps_without_tokens(self._idle_steps, counts, self._num_steps)
        dead = (self._idle_steps >= self._dead_expert_steps).sum(axis=-1)
        for name, values in balance._asdict().items():
            logs |= self._by_layer(name, values)
        logs |= {f"dead_experts/{layer}": int(number) for layer, number in zip(self._names, dead, strict=True)}
        logs |= {"max_vio": float(balance.max_vio.mean()), "load_entropy": float(balance.load_entropy.mean())}
        logs["dead_experts"] = int(dead.sum())
        if "dropped" in self._sums:
            fractions = totals["dropped"] / np.maximum(counts.sum(axis=-1), 1)
            logs |= self._by_layer("dropped_fraction", fractions) | {"dropped_fraction": float(fractions.mean())}
        self._loads.train = dict(zip(self._names, load_shares(counts).tolist(), strict=True))
        return logs

    def _distributions(self, totals: dict[str, np.ndarray], logit_max: np.ndarray) -> dict[str, float]:
        if (num_tokens := float(totals["tokens_with_entropy"])) == 0:
            return {}
        # A single expert has no distribution to speak of: as balanced as can be.
        largest = math.log(self._config.num_experts)
        means = totals["entropy"] / num_tokens / largest if largest else np.ones_like(totals["entropy"])
        return self._by_layer("router_entropy", means) | self._by_layer("router_logit_max", logit_max)

    def _gradient_norms(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        if not totals["gradients_measured"]:
            return {}
        norms = np.sqrt(totals["gradients"])
        return {f"grad_norm/{family}": float(norm) for family, norm in zip(FAMILIES, norms, strict=True)}

    def _attention_sinks(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        if not totals["sink_weights"]:
            return {}
        means = totals["sink_masses"] / totals["sink_weights"]
        logs = {f"attention_sink/layer_{i}": float(mean) for i, mean in enumerate(means)}
        return logs | {"attention_sink": float(means.mean())}

    # ---- resuming ----

    def state_dict(self) -> dict:
        """Return what a resumed run goes on from, as JSON can hold it; call `settle_tokens` on all ranks before.

        Steps without tokens are those up to the last log entry.
        """
        return {"num_tokens": self.num_tokens, "idle_steps": self._idle_steps.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` has returned."""
        self.num_tokens = state["num_tokens"]
        self._idle_steps = np.array(state["idle_steps"], dtype=np.int64).reshape(self._idle_steps.shape)


def router_bias_ranges(model: MoEForCausalLM) -> dict[str, float]:
    """Return the smallest and largest bias of each sparse layer's router with loss-free balancing, else nothing.

    All layers are read in one transfer to the host.

    Args:
        model: not wrapped; its routers may sit in expert-parallel layers.
    """
    sparse = [i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"]
    biases = [module.e_score_correction_bias for module in model.modules() if isinstance(module, MoERouter)]
    if not biases or biases[0] is None:
        return {}
    ranges = torch.stack([torch.stack(torch.aminmax(bias)) for bias in biases]).tolist()
    return {
        f"router_bias_{name}/layer_{layer}": value
        for layer, values in zip(sparse, ranges, strict=True)
        for name, value in zip(("min", "max"), values, strict=True)
    }
