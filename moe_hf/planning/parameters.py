"""Which parameters one rank holds before ZeRO divides them, in which groups of the optimizer, in which order."""

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..checkpoint.export import expected_tensors
from ..configuration_moe import MoEConfig
from ..parameter_families import is_router_weight
from .setting import Setting

# Elements of one rank's share of an expert group, as `parallel.autoep.split_expert_groups` divides them.
MAX_GROUP_SIZE = 178_956_971

# Matrices that tensor parallelism divides: by rows of the output, or by columns of the input.
_DIVIDED = re.compile(r"\.(self_attn\.(q|k|v|o|gate)|mlp\.(shared_experts\.)?(gate|up|down))_proj\.(weight|bias)$")

# As the Trainer tells which parameters do not decay.
_NOT_DECAYED = re.compile(r"bias|layernorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class Parameter:
    """One parameter as a rank holds it.

    Args:
        name: in the engine, where AutoEP has its own names for experts.
        numel: elements on this rank, before ZeRO.
        ranks: that share its states under ZeRO.
        is_expert: whether it belongs to routed experts that AutoEP has divided.
    """

    name: str
    numel: int
    ranks: int
    is_expert: bool = False

    @property
    def is_divided(self) -> bool:
        """Whether tensor parallelism divides it."""
        return _DIVIDED.search(self.name) is not None and not self.name.endswith(("o_proj.bias", "down_proj.bias"))

    @property
    def decays(self) -> bool:
        """Whether it is in the optimizer's group with weight decay."""
        return _NOT_DECAYED.search(self.name) is None

    @property
    def partition(self) -> int:
        """Elements of a rank's share at ZeRO 3, the last one's rounding included."""
        return math.ceil(self.numel / self.ranks)

    @property
    def module(self) -> str:
        """The module that owns it."""
        return self.name.rpartition(".")[0]


def local_parameters(config: MoEConfig, setting: Setting) -> list[Parameter]:
    """Return the parameters of a rank in the order of the model's modules."""
    return [part for _, parts in _by_source(config, setting) for part in parts]


def optimizer_groups(config: MoEConfig, setting: Setting) -> list[list[Parameter]]:
    """Return the optimizer's groups: what decays, what does not, and the experts of AutoEP in groups of their own."""
    dense, routers, experts = [], [], []
    for numel, parts in _by_source(config, setting):
        if parts[0].is_expert:
            experts.append((numel, parts))
        elif setting.ep_size and is_router_weight(parts[0].name):
            routers += parts  # AutoEP's own, which come after what was there before
        else:
            dense += parts
    dense += routers
    groups = [[p for p in dense if p.decays], [p for p in dense if not p.decays]]
    for chunk in _chunks(experts, MAX_GROUP_SIZE * max(setting.ep_size, 1)):
        groups.append(sorted(chunk, key=lambda p: (layer_of(p), p.name)))
    return [group for group in groups if group]


def layer_of(parameter: Parameter) -> int:
    """Return the number of the layer that a parameter belongs to."""
    return int(parameter.name.split(".layers.")[1].split(".")[0])


def _by_source(config: MoEConfig, setting: Setting) -> Iterator[tuple[int, list[Parameter]]]:
    """Yield each parameter of the saved model: its elements, and what a rank holds in its place."""
    for name, numel in _elements(config.to_json_string()).items():
        part = Parameter(name, numel, setting.data_parallel_size)
        if setting.zero.stage == 3 and not part.is_divided:
            # `zero.Init` has shared it over all ranks; what tensor parallelism divides is shared out anew.
            part = replace(part, ranks=setting.world_size)
        if ".mlp.experts." in name and setting.ep_size:
            yield numel, list(_of_autoep(part, setting))
        elif part.is_divided:
            yield numel, [replace(part, numel=math.ceil(numel / setting.tp_size))]
        else:
            yield numel, [part]


@functools.lru_cache(maxsize=4)
def _elements(text: str) -> dict[str, int]:
    """Return the elements of every parameter of a saved model, by its configuration as JSON: a search asks often."""
    tensors = expected_tensors(MoEConfig.from_dict(json.loads(text)))
    # The other tensors are buffers.
    return {name: t.numel() for name, t in tensors.items() if not name.endswith("e_score_correction_bias")}


def _of_autoep(part: Parameter, setting: Setting) -> Iterator[Parameter]:
    """Yield the matrices that AutoEP makes of one: gate and up apart, of this rank's experts only."""
    prefix, _, kind = part.name.rpartition(".")
    names = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    for name in names:
        numel = part.numel // len(names) // setting.ep_size
        yield Parameter(f"{prefix}.{name}", numel, setting.expert_data_parallel_size, is_expert=True)


def _chunks(sources: Iterable[tuple[int, list[Parameter]]], max_elements: int) -> Iterator[list[Parameter]]:
    chunk, size = [], 0
    for numel, parts in sources:
        if chunk and size + numel > max_elements:
            yield chunk
            chunk, size = [], 0
        chunk += parts
        size += numel
    if chunk:
        yield chunk
