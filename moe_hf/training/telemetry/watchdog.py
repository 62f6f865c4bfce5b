"""Alarms of a training that goes wrong: collapsed routers, dead experts, exploding router logits, a loss of NaN."""

import math
import re
from dataclasses import dataclass

from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from ...configuration_moe import MoEConfig

logger = logging.get_logger(__name__)

# An entropy of the load is judged from this many assignments per expert on: of few it is small by chance.
_MIN_ASSIGNMENTS_PER_EXPERT = 10

# How many layers one warning names.
_MAX_NAMED_LAYERS = 4

_COLLAPSE, _DEAD, _LOGITS, _LOSS = "collapse", "dead", "logits", "loss"

# Log entries in a row without its reason, after which an alarm may go off again.
_ENTRIES_TO_END = 2


@dataclass
class _Alarm:
    """One kind of trouble in one layer: raised once, and again only after it has ended.

    Args:
        least_entries: how many log entries in a row must be bad.
        least_steps: how many steps these must cover.
    """

    least_entries: int = 1
    least_steps: int = 0
    raised: bool = False
    num_entries: int = 0
    num_steps: int = 0

    def goes_off(self, bad: bool, num_steps: int) -> bool:
        """Take the verdict on one more log entry, which covers `num_steps` steps; return whether to warn now."""
        if bad == self.raised:
            self.num_entries = self.num_steps = 0
            return False
        self.num_entries += 1
        self.num_steps += num_steps
        if self.raised:
            turns = self.num_entries >= _ENTRIES_TO_END
        else:
            turns = self.num_entries >= self.least_entries and self.num_steps >= self.least_steps
        if turns:
            self.raised, self.num_entries, self.num_steps = bad, 0, 0
        return turns and bad


class RouterWatchdog(TrainerCallback):
    """Warn, once until it is over, of what the log entries of training show to be wrong; end the run if told to.

    - Collapse: the entropy of a layer's load, over its maximum, lies under `router_collapse_threshold`. A token's k
      experts are different ones, so that it never falls below log k / log E; where that is not under the threshold,
      the threshold is a tenth of the way from there to 1. Healthy routers collapse for some dozens of steps when they
      are new and the learning rate is high. So this must last for `dead_expert_steps` steps and two log entries in a
      row, of at least 10 assignments per expert each, after the learning rate's warm-up.
    - Dead experts: some got no token in the last `dead_expert_steps` steps, after as many steps.
    - Router logits beyond `router_logit_threshold`: bfloat16 tells them apart by steps of a half from 64 on
      (Zoph et al. 2022, arXiv 2202.08906, on rounding in the router).
    - A loss that is NaN or infinite.

    An alarm is over after two log entries in a row without its reason. A threshold of 0 switches its alarm off. Log
    entries are the same on all ranks, so that all ranks stop alike; rank 0 writes the warnings. A resumed run begins
    anew.

    Args:
        config: of the model.
        args: of the training, with `RouterArguments`.
    """

    def __init__(self, config: MoEConfig, args: TrainingArguments) -> None:
        self._config = config
        self._args = args
        self._alarms: dict[tuple[str, int | str], _Alarm] = {}
        self._step, self._num_steps = 0, 0
        self._num_tokens: int | None = None
        self.collapsed: str | None = None
        """Why `stop_on_router_collapse` has ended the run, without a full stop; `None` while it has not."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._step = state.global_step
        self._num_tokens = 0 if self._step == 0 else None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        self._num_steps, self._step = state.global_step - self._step, state.global_step
        new = {
            _COLLAPSE: self._collapsed_layers(logs, state),
            _DEAD: self._layers(_DEAD, logs, "dead_experts", self._has_dead_experts(state)),
            _LOGITS: self._layers(_LOGITS, logs, "router_logit_max", self._explodes),
        }
        loss = float(logs["loss"])
        warns_of_loss = self._goes_off(_LOSS, "", not math.isfinite(loss))
        if state.is_world_process_zero:
            if warns_of_loss:
                logger.warning(
                    f"Step {state.global_step}: the loss is {loss}; lower learning_rate, or look at the data."
                )
            for kind, layers in new.items():
                if layers:
                    logger.warning(f"Step {state.global_step}: {self._describe(kind, layers)}.")
        if new[_COLLAPSE] and self._args.stop_on_router_collapse:
            self.collapsed = f"{self._describe(_COLLAPSE, new[_COLLAPSE])} (step {state.global_step})"
            control.should_save = control.should_training_stop = True

    # ---- what is wrong ----

    def _collapsed_layers(self, logs: dict[str, float], state) -> dict[int, float]:
        before, self._num_tokens = self._num_tokens, logs.get("num_tokens")
        threshold, lowest = self._args.router_collapse_threshold, self._lowest_entropy()
        if threshold == 0 or lowest >= 1 or before is None or self._num_tokens is None:
            return {}
        assignments = (self._num_tokens - before) * self._config.num_experts_per_tok
        if assignments < _MIN_ASSIGNMENTS_PER_EXPERT * self._config.num_experts:
            return {}
        if self._step - self._num_steps < self._args.get_warmup_steps(state.max_steps):
            return {}
        if threshold <= lowest:
            threshold = lowest + 0.1 * (1 - lowest)
        return self._layers(_COLLAPSE, logs, "load_entropy", lambda entropy: entropy < threshold)

    def _lowest_entropy(self) -> float:
        """Return the entropy, over its maximum, of a load that k of E experts share alone: log k / log E."""
        num_experts, top_k = self._config.num_experts, self._config.num_experts_per_tok
        return 1.0 if top_k >= num_experts else math.log(top_k) / math.log(num_experts)

    def _has_dead_experts(self, state):
        ran_long_enough = state.global_step >= self._args.dead_expert_steps
        return lambda number: ran_long_enough and number > 0

    def _explodes(self, logit: float) -> bool:
        return 0 < self._args.router_logit_threshold < logit

    def _layers(self, kind: str, logs: dict[str, float], metric: str, is_bad) -> dict[int, float]:
        """Return the values of the layers where this alarm goes off with this entry."""
        found = {}
        for key, value in logs.items():
            if (match := re.fullmatch(rf"{metric}/layer_(\d+)", key)) and value is not None and not math.isnan(value):
                layer = int(match[1])
                if self._goes_off(kind, layer, bool(is_bad(value))):
                    found[layer] = value
        return found

    def _goes_off(self, kind: str, layer: int | str, bad: bool) -> bool:
        # Dead experts have their span in the metric itself; the others are wrong the first time.
        least = (2, self._args.dead_expert_steps) if kind == _COLLAPSE else (1, 0)
        return self._alarms.setdefault((kind, layer), _Alarm(*least)).goes_off(bad, self._num_steps)

    # ---- what to say ----

    def _describe(self, kind: str, layers: dict[int, float]) -> str:
        """Return one sentence without its full stop: the worst layer, the other layers, and what to change."""
        choose = min if kind == _COLLAPSE else max
        worst = choose(layers, key=layers.get)
        others = _also(sorted(set(layers) - {worst}))
        return f"model.layers.{worst}.mlp: {self._finding(kind, layers[worst])}{others}; {self._remedy(kind)}"

    def _finding(self, kind: str, value: float) -> str:
        num_experts, num_steps = self._config.num_experts, self._args.dead_expert_steps
        if kind == _COLLAPSE:
            return (
                f"few of {num_experts} experts got nearly all tokens for at least {num_steps} steps (entropy of the "
                f"load {value:.2f} of its maximum)"
            )
        if kind == _DEAD:
            return f"{value:.0f} of {num_experts} experts got no token in the last {num_steps} steps"
        threshold = self._args.router_logit_threshold
        return f"a router logit has reached {value:.4g}, beyond router_logit_threshold={threshold:g}"

    def _remedy(self, kind: str) -> str:
        config = self._config
        if kind == _LOGITS:
            return f"raise router_z_loss_coef (now {config.router_z_loss_coef:g}), or lower learning_rate"
        if self._args.freeze_router:
            return "leave freeze_router out, because a frozen router cannot balance its load"
        if config.router_balancing == "loss_free":
            speed = config.router_bias_update_speed
            return f"raise router_bias_update_speed (now {speed:g}), or use router_balancing=aux_loss"
        if config.router_balancing == "aux_loss":
            coef = config.router_aux_loss_coef
            return f"raise router_aux_loss_coef (now {coef:g}), or use router_balancing=loss_free"
        return f"use router_balancing=aux_loss or loss_free, not {config.router_balancing}"


def _also(layers: list[int]) -> str:
    if not layers:
        return ""
    named = [f"model.layers.{layer}.mlp" for layer in layers[: _MAX_NAMED_LAYERS - 1]]
    if num_others := len(layers) - len(named):
        named.append(f"{num_others} more")
    return f" (also in {', '.join(named)})"
