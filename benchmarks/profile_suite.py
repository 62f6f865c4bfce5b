"""The suite `profile`: on what the time of a pass or a step goes, by PyTorch's profiler.

Shares, not times: watching costs time itself.
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from moe_hf.planning.flops import flops_per_token

from .cases import DTYPES, LayerCase, StepCase
from .engines import start
from .inputs import LayerInputs, make_inputs
from .layer_suite import matmul_of, passes
from .peers.base import LayerPeer
from .peers.models import ModelPeer, our_config
from .results import FAILED, UNAVAILABLE, Row
from .step_equality import make_tokens, make_weights
from .step_suite import clean, name_of, that_fits
from .timing import Sample

SUITE = "profile"

PRODUCTS, REST = "products", "rest"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "_grouped_mm"}
_BEGINNINGS = {
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention"),
    "optimizer": ("_fused_adam",),
    "moved": ("copy_", "fill_", "zero_", "cat", "index", "_index", "gather", "scatter", "_embedding", "embedding"),
    "kernel": ("moe_hf::",),
}
KINDS = (PRODUCTS, *_BEGINNINGS, REST)
"""Kinds of operators. Moved is what is copied, gathered, summed by index or set to zero. On a CPU our kernel consists
of operators that count themselves, and what is left to it is Python."""

_REPEATS = 3

Run = Callable[[], Sample | tuple[Sample, torch.Tensor]]


def run_layer_profiles(cases: Iterable[LayerCase], peers: list[LayerPeer], device: str) -> Iterator[Row]:
    """Yield the shares of every peer in every layer whose experts are loaded unequally.

    Args:
        cases: the layers.
        peers: ours and others.
        device: `"cpu"` or `"cuda"`.
    """
    for case in (case for case in cases if case.routing == "skewed"):
        print(f"profile layer {case.name} {case.dtype}", file=sys.stderr, flush=True)
        inputs = make_inputs(case, device)
        ceiling = matmul_of(case.flops, inputs.hidden_states)
        for peer in peers:
            row = Row(SUITE, f"layer {case.name}", peer.name, case.dtype)
            yield _filled(row, peer.unavailable(case, device), _layer(peer, case, inputs), ceiling, device)


def run_step_profiles(
    cases: Iterable[StepCase], peers_of: Callable[[str], list[ModelPeer]], device: str
) -> Iterator[Row]:
    """Yield the shares of every peer in a step of every model.

    Args:
        cases: the models.
        peers_of: ours and others of a family.
        device: `"cpu"` or `"cuda"`.
    """
    for case in cases:
        peers = peers_of(case.family)
        if len(peers) < 2:
            continue  # only ours, beside nobody
        case = that_fits(case, device)
        print(f"profile step {name_of(case)} {case.dtype}", file=sys.stderr, flush=True)
        weights, tokens = make_weights(case, device), make_tokens(case, device)
        flops = case.tokens * flops_per_token(our_config(case), case.sequence_length).matmul
        ceiling = matmul_of(flops, torch.empty(0, dtype=DTYPES[case.dtype], device=tokens.device))
        for peer in peers:
            row = Row(SUITE, f"step {name_of(case)}", peer.name, case.dtype)
            yield _filled(row, peer.unavailable(case, device), _step(peer, case, weights, tokens), ceiling, device)


def milliseconds_by_kind(run: Run, device: str) -> dict[str, float]:
    """Return the time of every kind of operators in one run; what an operator calls does not count to it again."""
    for _ in range(2):
        run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as watched:
        for _ in range(_REPEATS):
            run()
    found = dict.fromkeys(KINDS, 0.0)
    for event in watched.key_averages():
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[kind_of(event.key)] += microseconds / 1e3 / _REPEATS
    return found


def kind_of(operator: str) -> str:
    """Return to which of `KINDS` an operator of the profiler belongs, or `REST`."""
    name = operator.removeprefix("aten::")
    if name in _PRODUCTS:
        return PRODUCTS
    return next((kind for kind, beginnings in _BEGINNINGS.items() if name.startswith(beginnings)), REST)


@contextmanager
def _layer(peer: LayerPeer, case: LayerCase, inputs: LayerInputs) -> Iterator[Run]:
    yield passes(peer.build(case, inputs.weights), inputs)


@contextmanager
def _step(peer: ModelPeer, case: StepCase, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> Iterator[Run]:
    training = start(peer, case, weights, tokens)
    try:
        yield training.step
    finally:
        training.end()
        clean(tokens.device.type)


def _filled(row: Row, unavailable: str | None, opened: AbstractContextManager[Run], ceiling: Run, device: str) -> Row:
    if unavailable is not None:
        row.status, row.reason = UNAVAILABLE, unavailable
        return row
    try:
        with opened as run:
            found = milliseconds_by_kind(run, device)
    except Exception as error:  # whatever another library raises is a result of this measurement
        row.status, row.reason = FAILED, f"{type(error).__name__}: {str(error)[:200]}"
        return row
    whole = sum(found.values())
    row.values |= {f"share_of_{kind}": time / whole for kind, time in found.items()}
    if device == "cpu":  # on a GPU some products are in kernels that do more
        at_ceiling = statistics.median(next(iter(ceiling().values())) for _ in range(_REPEATS))
        row.values["products_of_ceiling"] = at_ceiling / found[PRODUCTS]
    return row
