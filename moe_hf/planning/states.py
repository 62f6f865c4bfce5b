"""Bytes of weights, gradients and optimizer states on a rank, as DeepSpeed lays them out (ZeRO: arXiv 1910.02054).

The layout is read from DeepSpeed 0.19 and measured in `tests/distributed/test_planning.py`: flat buffers rounded up to
equal shares, at ZeRO 2 whole gradients of the parameters that a share's borders cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .memory import DISK, GPU, HOST, STEPPING, Amount
from .parameters import Parameter
from .setting import Setting

MASTER_BYTES = 4
MOMENTS_BYTES = 8
"""Of one parameter in the optimizer: its FP32 copy, and Adam's two moments."""

_PLACES = {"none": GPU, "cpu": HOST, "nvme": DISK}

# At ZeRO 1 and 2 shares are aligned to so many elements (`nccl_start_alignment_factor`).
_ALIGNMENT = 2


@dataclass(frozen=True)
class Share:
    """What one rank owns of a group of the optimizer, in elements.

    Args:
        whole: of the group before ZeRO, with what aligns it.
        own: the share.
        touched: elements of all parameters that the share has a piece of.
    """

    whole: int
    own: int
    touched: int


def share_of(group: list[Parameter], rank: int) -> Share:
    """Cut a group into equal shares at ZeRO 1 and 2, and return that of one of the ranks that share it.

    Args:
        group: parameters of one optimizer group, in order.
        rank: within the ranks that share the group, so modulo their number.
    """
    ranks = group[0].ranks
    numel = sum(p.numel for p in group)
    own = -(-numel // (_ALIGNMENT * ranks)) * _ALIGNMENT
    start, touched, offset = rank % ranks * own, 0, 0
    for parameter in group:
        if offset < start + own and offset + parameter.numel > start:
            touched += parameter.numel
        offset += parameter.numel
    return Share(own * ranks, own, touched)


def state_amounts(groups: list[list[Parameter]], setting: Setting, rank: int) -> list[Amount]:
    """Return what a rank holds of weights, gradients and optimizer states between steps and micro-batches.

    Args:
        groups: of `optimizer_groups`.
        setting: how the model is trained.
        rank: among all ranks; shares differ a little.
    """
    if setting.zero.stage == 3:
        return list(_of_zero3(groups, setting))
    if setting.zero.stage == 0:
        return list(_unsharded(groups, setting))
    # Ranks with the same experts are as far apart as their group is wide.
    within_experts = rank // max(setting.ep_size, 1)
    shares = [share_of(group, within_experts if group[0].is_expert else rank // setting.tp_size) for group in groups]
    return list(_of_zero12(shares, groups, setting))


def _unsharded(groups: list[list[Parameter]], setting: Setting) -> Iterator[Amount]:
    numel = sum(p.numel for group in groups for p in group)
    yield Amount("weights", "weights", setting.item_size * numel)
    yield Amount("gradients", "gradients", setting.gradient_item_size * numel)
    if setting.reduced_precision:
        yield Amount("optimizer", "FP32 weights", MASTER_BYTES * numel)
        yield Amount("buffers", "FP32 gradients of the step", MASTER_BYTES * numel, when=STEPPING)
    yield Amount("optimizer", "two moments", MOMENTS_BYTES * numel)


def _of_zero12(shares: list[Share], groups: list[list[Parameter]], setting: Setting) -> Iterator[Amount]:
    whole, own, touched = (sum(getattr(share, name) for share in shares) for name in ("whole", "own", "touched"))
    place = _PLACES[setting.zero.offload_optimizer]
    offloaded = place != GPU
    yield Amount("weights", "weights", setting.item_size * whole)
    # Also in FP32: the optimizer has a copy of its own share.
    yield Amount("optimizer", "FP32 weights", MASTER_BYTES * own, place)
    yield Amount("optimizer", "two moments", MOMENTS_BYTES * own, place)
    if offloaded:
        largest = max(p.numel for group in groups for p in group)
        yield Amount("gradients", "FP32 gradients", MASTER_BYTES * own, HOST)
        yield Amount("buffers", "new weights on their way", setting.item_size * own, HOST)
        yield Amount("buffers", "one gradient on its way", setting.item_size * largest, HOST)
        yield Amount("buffers", "one gradient on its way", setting.item_size * largest)
        if setting.accumulation > 1:
            yield Amount("gradients", "accumulated gradients", MASTER_BYTES * touched, HOST)
        if setting.zero.stage == 1:
            yield Amount("gradients", "gradients", setting.item_size * sum(p.numel for g in groups for p in g))
    else:
        yield from _gradients_of_zero12(own, touched, groups, setting)
        largest = max(share.own for share in shares)
        yield Amount("buffers", "FP32 gradients of one group", MASTER_BYTES * largest, when=STEPPING)
        if setting.gradient_item_size < MASTER_BYTES:
            flat = setting.gradient_item_size * largest
            yield Amount("buffers", "gradients of one group, flat", flat, when=STEPPING)


def _gradients_of_zero12(own: int, touched: int, groups, setting: Setting) -> Iterator[Amount]:
    if setting.zero.stage == 1:
        numel = sum(p.numel for group in groups for p in group)
        yield Amount("gradients", "gradients", setting.item_size * numel)
    elif setting.gradient_item_size > setting.item_size:
        yield Amount("gradients", "FP32 gradients of its share", setting.gradient_item_size * own)
    else:
        yield Amount("gradients", "gradients of its share", setting.item_size * touched)
        if setting.accumulation > 1:
            yield Amount("buffers", "gradients of the micro-batch", setting.item_size * touched, when="computing")


def _of_zero3(groups: list[list[Parameter]], setting: Setting) -> Iterator[Amount]:
    zero = setting.zero
    own = sum(p.partition for group in groups for p in group)
    # Where one rank has all of a weight, on the device, its share is the whole.
    is_copy = zero.offload_param != "none"
    kept = sum(p.numel for p in persistent(groups, setting) if p.ranks > 1 or is_copy)
    optimizer = _PLACES[zero.offload_optimizer]
    yield Amount("weights", "weights of its share", setting.item_size * own, _PLACES[zero.offload_param])
    yield Amount("weights", "small weights, whole", setting.item_size * kept)
    gradients = HOST if zero.offload_optimizer != "none" else GPU
    yield Amount("gradients", "gradients of its share", setting.gradient_item_size * own, gradients)
    # Also in FP32, as at stages 1 and 2.
    yield Amount("optimizer", "FP32 weights", MASTER_BYTES * own, optimizer)
    yield Amount("optimizer", "two moments", MOMENTS_BYTES * own, optimizer)
    if zero.offload_optimizer == "none":
        largest = max(_sub_group_sizes(groups, zero.sub_group_size))
        yield Amount("buffers", "FP32 gradients of one sub-group", MASTER_BYTES * largest, when=STEPPING)
        if setting.gradient_item_size < MASTER_BYTES:
            flat = setting.gradient_item_size * largest
            yield Amount("buffers", "gradients of one sub-group, flat", flat, when=STEPPING)
    else:
        yield Amount("gradients", "FP32 gradients", MASTER_BYTES * own, optimizer)


def persistent(groups: list[list[Parameter]], setting: Setting) -> list[Parameter]:
    """Return the parameters that ZeRO 3 keeps whole on every rank because they are small."""
    kept, size = [], 0
    for parameter in (p for group in groups for p in group):
        if size + parameter.numel > setting.zero.model_persistence_threshold:
            continue
        if parameter.numel <= setting.zero.param_persistence_threshold:
            kept.append(parameter)
            size += parameter.numel
    return kept


def _sub_group_sizes(groups: list[list[Parameter]], limit: int) -> Iterator[int]:
    for group in groups:
        size = 0
        for parameter in group:
            size += parameter.partition
            if size >= limit:
                yield size
                size = 0
        yield size
