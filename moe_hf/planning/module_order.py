"""The order in which the modules of a model run in one micro-batch, backward passes and recomputation included.

ZeRO 3 acts whenever a module begins, also one without weights of its own, which here is an empty list. The order was
read off from what DeepSpeed fetches in real engines, and `tests/unit/planning/test_gathering.py` reads it off again.
"""

import itertools
from collections import defaultdict

from ..configuration_moe import MoEConfig
from .parameters import Parameter
from .setting import Setting

Uses = list[list[Parameter]]

_ATTENTION = ("q_proj", "k_proj", "q_norm", "k_norm", "v_proj", "", "gate_proj", "o_proj")
_MLP = ("gate_proj", "", "up_proj", "down_proj")


def modules_in_order(parameters: list[Parameter], config: MoEConfig, setting: Setting) -> Uses:
    """Return the parameters of each module as the modules come; empty lists are modules without any.

    Args:
        parameters: of `local_parameters`.
        config: of the model.
        setting: how it is trained.
    """
    owned = defaultdict(list)
    for parameter in parameters:
        owned[_unit(parameter, setting)].append(parameter)
    embedding, norm, head = (owned[name] for name in ("model.embed_tokens", "model.norm", "lm_head"))
    head = embedding if config.tie_word_embeddings else head
    layers = [_Layer(owned, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
    forward = [[], [], embedding, [], *itertools.chain(*([[], *layer.forward] for layer in layers)), norm, head]
    # The decoder hears of each tensor that it has handed on: its last states, and the logits of every router.
    backward = [[], head, *([[]] * (1 + config.num_sparse_layers)), norm]
    for layer in reversed(layers):
        backward += [[], *layer.backward(setting.checkpointing)]
    return [*forward, *backward, embedding]


class Unfinished(list):
    """The parameters of a module that is still running when the next one begins, so that it keeps them."""


class _Layer:
    """What one decoder layer runs.

    Args:
        owned: the parameters of each module, by its name.
        prefix: of the layer's modules.
    """

    def __init__(self, owned: dict[str, list[Parameter]], prefix: str) -> None:
        self._owned, self._prefix = owned, prefix
        attention = self._existing("self_attn.", _ATTENTION)
        self._before, self._after = ([owned[f"{prefix}{name}_layernorm"]] for name in ("input", "post_attention"))
        self._attention = [[], *attention]
        # The last modules: those that run backward before recomputation begins, and the others.
        self._mlp, self._ahead, self._behind = self._last_modules()

    @property
    def forward(self) -> Uses:
        return [*self._before, *self._attention, *self._after, *self._mlp]

    def backward(self, checkpointing: bool) -> Uses:
        again = self.forward if checkpointing else []
        ahead = [Unfinished(use) for use in self._ahead] if checkpointing else self._ahead
        _, *attention = self._attention
        tap = attention.index([])
        # The tap hands on two tensors, and hears of both.
        attention[tap:tap] = [[]]
        return [*ahead, *again, *self._behind, *self._after, [], *attention[::-1], *self._before]

    def _last_modules(self) -> tuple[Uses, Uses, Uses]:
        """Recomputation begins when the first saved tensor is asked for, which only some modules come before."""
        if block := self._get("mlp"):
            return [block], [block], []
        if not (experts := self._get("mlp.experts")):
            gate, act, up, down = mlp = self._existing("mlp.", _MLP)
            return [[], *mlp], [[], down], [up, act, gate]
        routed, routed_backward = [[], self._get("mlp.gate"), [], experts], [experts, self._get("mlp.gate"), []]
        if not self._get("mlp.shared_experts.down_proj"):
            return routed, [[]], routed_backward
        gate, act, up, down = mlp = self._existing("mlp.shared_experts.", _MLP)
        shared, behind = [[], *mlp], [up, act, gate, *routed_backward]
        if weight := self._get("mlp.shared_experts_gate"):
            return [*routed, *shared, weight], [[]], [weight, [], down, *behind]
        return [*routed, *shared], [[], [], down], behind

    def _get(self, name: str) -> list[Parameter]:
        return self._owned.get(f"{self._prefix}{name}", [])

    def _existing(self, prefix: str, names: tuple[str, ...]) -> Uses:
        return [self._get(prefix + name) if name else [] for name in names if not name or self._get(prefix + name)]


def _unit(parameter: Parameter, setting: Setting) -> str:
    """Name what is fetched together: a module, or without AutoEP a whole sparse block."""
    block, found, rest = parameter.name.partition(".mlp.")
    is_sparse = found and rest.split(".")[0] in ("gate", "experts", "shared_experts", "shared_experts_gate")
    return f"{block}.mlp" if is_sparse and not setting.ep_size else parameter.module
