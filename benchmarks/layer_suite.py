"""The suite `layer`: one sparse block, forward and backward."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from .cases import LayerCase
from .counting import OperatorCount, counted_synchronisations, memory_use, saved_bytes
from .equality import check_layer, reference_results
from .inputs import LayerInputs, make_inputs
from .peers.base import Layer, LayerPeer
from .peers.registry import CEILING, OURS
from .results import MEASURED, UNAVAILABLE, Row, settled
from .timing import Rounds, Sample, Watch, clock_of, interleave

SUITE = "layer"

# A larger product is made as several of this size, which is as fast: 0.5 GB for each matrix in 16 bits.
_LARGEST_PRODUCT = 16384

# Larger than the caches of a GPU, and written before every pass, so that nothing is found there.
_FLUSHED_BYTES = 2**28


def run_layers(
    cases: Iterable[LayerCase],
    peers: list[LayerPeer],
    device: str,
    num_rounds: int,
    watch: Watch | None = None,
) -> Iterator[Row]:
    """Check, count and time every peer in every case; yield the rows of a case when it is done.

    Args:
        cases: the layers.
        peers: ours and others.
        device: `"cpu"` or `"cuda"`.
        num_rounds: of timing; 0 to check and count only.
        watch: looks after the machine while times are taken.
    """
    for case in cases:
        print(f"layer {case.name} {case.dtype} {case.routing}", file=sys.stderr, flush=True)
        yield from _run_case(case, peers, device, num_rounds, watch)


def _run_case(case: LayerCase, peers: list[LayerPeer], device: str, num_rounds: int, watch) -> Iterator[Row]:
    inputs = make_inputs(case, device)
    row = Row(SUITE, case.name, CEILING, case.dtype, case.routing, values={"imbalance": inputs.imbalance})
    rows = {peer.name: replace(row, peer=peer.name, values=row.values.copy(), ratios={}) for peer in peers}
    try:
        layers = _admitted(peers, case, inputs, rows)
        if num_rounds and layers:
            contestants = {name: passes(layer, inputs) for name, layer in layers.items()}
            contestants[CEILING] = matmul_of(case.flops, inputs.hidden_states)
            rows[CEILING] = row
            _time(contestants, case, num_rounds, watch, rows)
    except (Exception, KeyboardInterrupt):
        yield from settled(rows.values(), "forward_backward_ms")
        raise
    yield from rows.values()


def _admitted(peers: list[LayerPeer], case: LayerCase, inputs: LayerInputs, rows: dict[str, Row]) -> dict[str, Layer]:
    """Compare all with the reference and count; return those that are timed."""
    expected = reference_results(case, inputs)
    layers = {}
    for peer in peers:
        layer = admit(peer, case, inputs, expected, rows[peer.name])
        if layer is not None:
            with rows[peer.name].recording_failure():
                rows[peer.name].values |= count_layer(layer, case, inputs)
                layers[peer.name] = layer
    return layers


def _time(
    contestants: dict[str, Callable[[], Sample]], case: LayerCase, num_rounds: int, watch, rows: dict[str, Row]
) -> None:
    rounds = interleave(contestants, num_rounds, watch)
    for name, reason in rounds.failed.items():
        rows[name].fail(reason)
    for row in (rows[name] for name in contestants if rows[name].status == MEASURED):
        _add_times(row, rounds, case)


def admit(
    peer: LayerPeer, case: LayerCase, inputs: LayerInputs, expected: dict[str, torch.Tensor], row: Row
) -> Layer | None:
    """Build a peer and compare it with the reference; where that fails, write down why and return `None`."""
    device = inputs.hidden_states.device.type
    if (reason := peer.unavailable(case, device)) is not None:
        row.status, row.reason = UNAVAILABLE, reason
        return None
    with row.recording_failure():
        layer = peer.build(case, inputs.weights)
        errors = check_layer(layer, case, inputs, expected)
        row.values["max_error"] = max(row.values.get("max_error", 0.0), *errors.values())
        return layer
    return None


def count_layer(layer: Layer, case: LayerCase, inputs: LayerInputs) -> dict[str, float]:
    """Return what does not depend on time: operators, synchronisations and bytes of one forward and backward pass."""
    device = inputs.hidden_states.device.type
    tokens = inputs.hidden_states.detach().requires_grad_()

    def forward() -> torch.Tensor:
        return layer.forward(tokens)

    def backward(output: torch.Tensor) -> None:
        output.backward(inputs.output_gradient)

    def clear() -> None:
        layer.clear_gradients()
        tokens.grad = None

    saved = saved_bytes(forward, layer.module.parameters())
    with OperatorCount() as ahead:
        output = forward()
    with OperatorCount() as back:
        backward(output)
    clear()
    with counted_synchronisations(device) as synchronisations:
        backward(forward())
    clear()
    memory = memory_use(device, forward, backward)
    clear()
    return {
        "saved_over_minimum": saved / (case.tokens * case.minimum_saved),
        "saved_bytes": saved,
        "held_bytes": memory.held,
        "peak_bytes": memory.peak,
        "operators": ahead.total + back.total,
        "forward_operators": ahead.total,
        "synchronisations": synchronisations[0],
    }


def passes(layer: Layer, inputs: LayerInputs) -> Callable[[], Sample]:
    """Return a contestant that runs a layer forward and backward."""
    device = inputs.hidden_states.device
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def run() -> Sample:
        layer.clear_gradients()
        tokens = inputs.hidden_states.detach().requires_grad_()
        if flushed is not None:
            flushed.zero_()
        clock = clock_of(device.type)
        output = layer.forward(tokens)
        clock.mark()
        output.backward(inputs.output_gradient)
        clock.mark()
        forward, both = clock.milliseconds()
        return {"forward_ms": forward, "forward_backward_ms": both}

    return run


def matmul_of(flops: float, like: torch.Tensor, what: str = "forward_backward_ms") -> Callable[[], Sample]:
    """Return a contestant that makes one dense matrix product of nearly as many FLOPs, told as if of just as many.

    Where one of so many would be too large, it makes several.

    Args:
        flops: 2 for each multiplication and addition.
        like: a tensor of the same dtype and device.
        what: the name of its time.
    """
    repeats = math.ceil(flops / (2 * _LARGEST_PRODUCT**3))
    size = max(64, round((flops / repeats / 2) ** (1 / 3) / 64) * 64)
    a, b = (torch.randn(size, size, device=like.device).to(like.dtype) for _ in range(2))
    product = torch.empty_like(a)

    def run() -> Sample:
        clock = clock_of(like.device.type)
        for _ in range(repeats):
            torch.mm(a, b, out=product)
        clock.mark()
        return {what: clock.milliseconds()[0] * flops / (repeats * 2 * size**3)}

    return run


def _add_times(row: Row, rounds: Rounds, case: LayerCase) -> None:
    for metric in ("forward_ms", "forward_backward_ms"):
        if (median := rounds.median(row.peer, metric)) is not None:
            row.values[metric] = median
        if row.peer != OURS and (ratio := rounds.ratio(OURS, row.peer, metric)) is not None:
            row.ratios[metric] = ratio
    add_rates(row, rounds, "forward_backward_ms", case.tokens, case.flops)


def add_rates(row: Row, rounds: Rounds, metric: str, tokens: int, flops: float) -> None:
    """Write down what follows from a median time: tokens a second, TFLOP/s, and the share of the ceiling's rate."""
    seconds = row.values[metric] / 1e3
    row.values |= {"tokens_per_second": tokens / seconds, "tflops": flops / seconds / 1e12}
    if (ratio := rounds.ratio(row.peer, CEILING, metric)) is not None:
        row.values["ceiling_share"] = ratio.median
