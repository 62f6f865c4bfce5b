"""Bytes that a rank moves in one optimizer step, by collective, group and purpose.

A message is counted as DeepSpeed's `comms_logger` counts it: the tensor that a rank hands in, of all-gathers its own
share. What crosses links follows from the ring algorithms (Patarasuk & Yuan 2009; NCCL's performance notes): a rank
sends 2 (n - 1) / n of the message in an all-reduce, n - 1 times its share in an all-gather, (n - 1) / n in a
reduce-scatter, a reduce and an all-to-all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..configuration_moe import MoEConfig
from .gathering import Gathering
from .parameters import Parameter
from .setting import Setting
from .states import persistent, share_of

_SENT = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather_into_tensor": lambda n: n - 1,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
}

# Counts of tokens for each expert are int32 where experts are exchanged.
_COUNT_BYTES = 4

# DeepSpeed sums these gradients in float32.
_WHOLE_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Collective:
    """All messages of one kind and purpose in one optimizer step, on average over ranks.

    Args:
        operation: by DeepSpeed's name.
        purpose: in words.
        ranks: that take part.
        stride: how far apart their numbers are.
        message: bytes handed in.
        waits: whether computation waits for it, instead of running beside it.
    """

    operation: str
    purpose: str
    ranks: int
    stride: int
    message: int
    waits: bool

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return self.message * _SENT[self.operation](self.ranks)

    def crosses_machines(self, gpus_per_node: int) -> bool:
        """Whether some of the ranks are on different machines."""
        return self.ranks > 1 and (self.ranks - 1) * self.stride >= gpus_per_node


def collectives(
    groups: list[list[Parameter]], config: MoEConfig, setting: Setting, gathered: Gathering | None
) -> list[Collective]:
    """Return what a rank sends and receives in one optimizer step.

    Args:
        groups: of `optimizer_groups`.
        config: of the model.
        setting: how it is trained.
        gathered: of `gathering`, at ZeRO 3.
    """
    found = [*_zero(groups, setting, gathered), *_experts(config, setting)]
    found += _tensor_parallel(groups, config, setting)
    # DeepSpeed gathers nothing where one rank has it all, but hands in what it reduces.
    return [each for each in found if each.message and (each.ranks > 1 or "gather" not in each.operation)]


def _zero(groups: list[list[Parameter]], setting: Setting, gathered: Gathering | None) -> Iterator[Collective]:
    for is_expert in (False, True):
        of_kind = [group for group in groups if group[0].is_expert == is_expert]
        if not of_kind:
            continue
        ranks = of_kind[0][0].ranks
        where = {"ranks": ranks, "stride": setting.ep_size if is_expert else setting.tp_size}
        what = "of experts" if is_expert else "of all but experts" if setting.ep_size else "of all"
        if setting.zero.stage == 3:
            yield from _zero3([p for group in of_kind for p in group], setting, gathered, what, where)
        else:
            yield from _zero012(of_kind, setting, what, where)


def _zero012(groups: list[list[Parameter]], setting: Setting, what: str, where: dict) -> Iterator[Collective]:
    stage = setting.zero.stage
    numel = sum(p.numel for group in groups for p in group)
    # ZeRO 2 reduces the gradients of every micro-batch, the others those of the whole step.
    times = setting.accumulation if stage == 2 else 1
    item_size = setting.item_size if stage == 0 else setting.communication_item_size
    scatters = stage > 0 and setting.zero.reduce_scatter and not setting.zero.use_multi_rank_bucket_allreduce
    yield Collective(
        "reduce" if scatters else "all_reduce",
        f"gradients {what}",
        message=times * item_size * numel,
        waits=not setting.zero.overlap_comm,
        **where,
    )
    if stage > 0:
        own = sum(share_of(group, 0).own for group in groups)
        message = setting.item_size * own
        yield Collective("all_gather_into_tensor", f"new weights {what}", message=message, waits=True, **where)


def _zero3(
    parameters: list[Parameter], setting: Setting, gathered: Gathering, what: str, where: dict
) -> Iterator[Collective]:
    waits = not setting.zero.overlap_comm
    shared = [p for p in parameters if p.ranks > 1]
    elements = sum(gathered.times.get(p.name, 0) * p.partition for p in shared)
    message = setting.accumulation * setting.item_size * elements
    yield Collective("all_gather_into_tensor", f"weights {what}", message=message, waits=waits, **where)
    kept = {p.name for p in persistent([parameters], setting)}
    message = setting.item_size * sum(p.partition for p in shared if p.name in kept)
    yield Collective("all_gather_into_tensor", f"small new weights {what}", message=message, waits=True, **where)
    scatters = setting.zero.reduce_scatter
    elements = sum(p.partition * p.ranks if scatters else p.numel for p in parameters)
    yield Collective(
        "reduce_scatter_tensor" if scatters else "all_reduce",
        f"gradients {what}",
        message=setting.accumulation * setting.communication_item_size * elements,
        waits=waits,
        **where,
    )


def _experts(config: MoEConfig, setting: Setting) -> Iterator[Collective]:
    """Yield AutoEP's exchange of tokens: to the experts and back, in each direction of computation."""
    if setting.ep_size <= 1:
        return
    forwards = 2 if setting.checkpointing else 1
    layers = config.num_sparse_layers * setting.accumulation
    rows = setting.tokens * config.num_experts_per_tok // setting.tp_size
    row_bytes = setting.item_size * config.hidden_size
    where = {"ranks": setting.ep_size, "stride": 1, "waits": True}
    exchanged = 2 * (forwards + 1) * layers * rows * row_bytes
    yield Collective("all_to_all_single", "tokens to experts and back", message=exchanged, **where)
    counts = forwards * layers * _COUNT_BYTES * config.num_experts
    yield Collective("all_to_all_single", "numbers of these tokens", message=counts, **where)


def _tensor_parallel(groups: list[list[Parameter]], config: MoEConfig, setting: Setting) -> Iterator[Collective]:
    """Yield the sums of AutoTP: after each row-divided matrix, and backward before each column-divided one.

    Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) has one backward for each block; AutoTP takes the
    matrices that share an input one by one. Recomputation ends before the last sum of a dense layer.
    """
    if setting.tp_size == 1:
        return
    layers, sparse = config.num_hidden_layers, config.num_sparse_layers
    shared = sparse if config.shared_expert_intermediate_size else 0
    mlps = layers - sparse + shared
    forward = layers + mlps + ((layers + shared) if setting.checkpointing else 0)
    inputs_of_attention = 3 if config.attention_gate is None else 4
    backward = inputs_of_attention * layers + 2 * mlps
    hidden = setting.item_size * setting.tokens * config.hidden_size * setting.accumulation
    where = {"ranks": setting.tp_size, "stride": 1, "waits": True}
    with_experts = sparse if setting.ep_size else 0
    message = (forward + backward + with_experts) * hidden
    yield Collective("all_reduce", "activations over tensor parallelism", message=message, **where)
    if with_experts:
        rows = with_experts * config.num_experts_per_tok * hidden // setting.tp_size
        yield Collective("all_reduce", "experts' rows over tensor parallelism", message=2 * rows, **where)
        # Every rank has sent other rows to the experts, so each has a part of the gradient of what is not divided.
        whole = sum(p.numel for group in groups for p in group if not p.is_expert and not p.is_divided)
        times = setting.accumulation if setting.zero.stage > 1 else 1
        message = _WHOLE_GRADIENT_BYTES * whole * times
        yield Collective("all_reduce", "gradients of what is not divided", message=message, **where)
