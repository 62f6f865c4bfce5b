"""The suite `scaling`: how time and memory grow with experts, tokens, layers and the length of sequences.

A slope is that of a line through the logarithms: 1 where twice as much takes twice as long. Experts are added while
each token visits as many as before, of the same width: its FLOPs stay, but for the router's.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .cases import DTYPES, LayerCase, StepCase
from .counting import MemoryUse, memory_use
from .engines import clean
from .equality import reference_results
from .inputs import make_inputs
from .layer_suite import admit, count_layer, passes
from .peers.base import LayerPeer
from .peers.models import ModelPeer
from .results import MEASURED, UNAVAILABLE, Row, settled
from .step_equality import Expected, check_gradients, make_tokens, make_weights
from .timing import Sample, Watch, clock_of, interleave

SUITE = "scaling"

AUTO = ("mixtral/grouped_mm", "mixtral/eager")
"""Peers beside ours when none are named."""

_LAYER = {
    "cpu": LayerCase("scaling", 1024, 256, 8, 2, 256, "fp32"),
    "cuda": LayerCase("scaling", 16384, 1024, 8, 2, 512, "bf16"),
}
_MODEL = {
    "cpu": StepCase("scaling", 256, 8, 2, 256, 1, 4, 4, 1024, batch=1, sequence_length=256, dtype="fp32"),
    "cuda": StepCase("scaling", 1024, 8, 2, 512, 2, 16, 16, 8192, batch=4, sequence_length=1024, dtype="bf16"),
}
_FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class _Point:
    """One size of one peer."""

    size: int
    run: Callable[[], Sample]
    memory: MemoryUse


def run_scaling(
    layer_peers: list[LayerPeer],
    model_peers: list[ModelPeer],
    device: str,
    num_rounds: int,
    watch: Watch | None = None,
    factors: tuple[int, ...] = _FACTORS,
) -> Iterator[Row]:
    """Yield the slopes of every peer along every axis.

    Args:
        layer_peers: ours and others, for experts and tokens.
        model_peers: ours and others, for layers and the length of sequences.
        device: `"cpu"` or `"cuda"`.
        num_rounds: of timing.
        watch: looks after the machine while times are taken.
        factors: by which the smallest size is multiplied.
    """
    for axis, field in (("experts", "num_experts"), ("tokens", "tokens")):
        base = _LAYER[device]
        cases = [replace(base, **{field: factor * getattr(base, field)}) for factor in factors]
        sizes = [getattr(case, field) for case in cases]
        yield from _along(axis, sizes, layer_peers, cases, _layer_points, device, num_rounds, watch)
    for axis, field in (("layers", "layers"), ("sequence length", "sequence_length")):
        base = _MODEL[device]
        cases = [replace(base, **{field: factor * getattr(base, field)}) for factor in factors]
        sizes = [getattr(case, field) for case in cases]
        yield from _along(axis, sizes, model_peers, cases, _model_points, device, num_rounds, watch)


def slope(sizes: list[float], values: list[float]) -> float:
    """Return the exponent b of the power law a * size ** b that fits best in logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def _along(axis: str, sizes: list[int], peers: list, cases: list, points, device: str, num_rounds: int, watch):
    print(f"scaling {axis}", file=sys.stderr, flush=True)
    config = f"{axis} {sizes[0]} to {sizes[-1]}"
    rows = {peer.name: Row(SUITE, config, peer.name, cases[0].dtype) for peer in peers}
    found: dict[str, list[_Point]] = {name: [] for name in rows}
    try:
        for case, size in zip(cases, sizes, strict=True):
            for peer, run, memory in points(case, [p for p in peers if rows[p.name].status == MEASURED], device, rows):
                found[peer].append(_Point(size, run, memory))
        _time(sizes, found, num_rounds, watch, rows)
        clean(device)
    except (Exception, KeyboardInterrupt):
        yield from settled(rows.values(), "time_slope")
        raise
    yield from rows.values()


def _time(sizes: list[int], found: dict[str, list[_Point]], num_rounds: int, watch, rows: dict[str, Row]) -> None:
    """Time all points of those that have come so far in the same rounds, and fill their rows."""
    whole = {name: those for name, those in found.items() if rows[name].status == MEASURED}
    contestants = {f"{name} {point.size}": point.run for name, those in whole.items() for point in those}
    rounds = interleave(contestants, num_rounds, watch)
    for name, those in whole.items():
        reasons = [rounds.failed[f"{name} {p.size}"] for p in those if f"{name} {p.size}" in rounds.failed]
        if reasons:
            rows[name].fail(reasons[0])
            continue
        times = [rounds.median(f"{name} {point.size}", "forward_backward_ms") for point in those]
        rows[name].values |= {
            "time_slope": slope(sizes, times),
            "held_slope": slope(sizes, [point.memory.held for point in those]),
            "peak_slope": slope(sizes, [point.memory.peak for point in those]),
        }
        rows[name].values |= {f"forward_backward_ms_at_{point.size}": t for point, t in zip(those, times, strict=True)}


def _layer_points(
    case: LayerCase, peers: list[LayerPeer], device: str, rows: dict[str, Row]
) -> Iterator[tuple[str, Callable[[], Sample], MemoryUse]]:
    inputs = make_inputs(case, device)
    expected = reference_results(case, inputs)
    for peer in peers:
        layer = admit(peer, case, inputs, expected, rows[peer.name])
        counted = {}
        if layer is not None:
            with rows[peer.name].recording_failure():
                counted = count_layer(layer, case, inputs)
        if counted:
            yield peer.name, passes(layer, inputs), MemoryUse(counted["held_bytes"], counted["peak_bytes"])


def _model_points(
    case: StepCase, peers: list[ModelPeer], device: str, rows: dict[str, Row]
) -> Iterator[tuple[str, Callable[[], Sample], MemoryUse]]:
    tokens = make_tokens(case, device)
    weights = make_weights(case, device)
    expected = Expected(case, weights, tokens, with_gradients=device == "cpu")
    for peer in peers:
        row = rows[peer.name]
        if (reason := peer.unavailable(case, device)) is not None:
            row.status, row.reason = UNAVAILABLE, reason
            continue
        with row.recording_failure():
            errors = check_gradients(peer, case, weights, tokens, expected, device)
            row.values["max_error"] = max(row.values.get("max_error", 0.0), *errors.values())
            model = peer.load(case, weights, tokens.device).to(DTYPES[case.dtype]).train()
            run = _model_passes(peer, model, tokens)
            memory = _memory_of(peer, model, tokens)
        if row.status == MEASURED:
            yield peer.name, run, memory


def _model_passes(peer: ModelPeer, model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], Sample]:
    def run() -> Sample:
        model.zero_grad(set_to_none=True)
        clock = clock_of(tokens.device.type)
        loss = peer.loss(model, tokens)
        clock.mark()
        loss.backward()
        clock.mark()
        forward, both = clock.milliseconds()
        return {"forward_ms": forward, "forward_backward_ms": both}

    return run


def _memory_of(peer: ModelPeer, model: torch.nn.Module, tokens: torch.Tensor) -> MemoryUse:
    peer.loss(model, tokens).backward()  # what is made once
    model.zero_grad(set_to_none=True)
    used = memory_use(tokens.device.type, lambda: peer.loss(model, tokens), lambda loss: loss.backward())
    model.zero_grad(set_to_none=True)
    return used
