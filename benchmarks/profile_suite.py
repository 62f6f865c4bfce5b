"""The suite `profile`: on what the time of a pass or a step goes, by PyTorch's profiler.

Shares, not times: watching costs time itself.
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe_hf.planning.flops import flops_per_token

from .cases import DTYPES, LayerCase, StepCase
from .equality import reference_results
from .inputs import make_inputs
from .layer_suite import admit, matmul_of, passes
from .peers.base import LayerPeer
from .peers.models import ModelPeer, our_config
from .peers.registry import CEILING
from .results import Row, settled
from .step_equality import Gate, make_tokens, make_weights
from .step_suite import beside_others, name_of, side_by_side, started, tell_failures
from .timing import Sample, Watch, interleave

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

# Profiles take longer than what is profiled.
_MOST_ROUNDS = 7

_FILLED = f"share_of_{PRODUCTS}"

Run = Callable[[], Sample | tuple[Sample, torch.Tensor]]


def run_layer_profiles(
    cases: Iterable[LayerCase], peers: list[LayerPeer], device: str, num_rounds: int, watch: Watch | None = None
) -> Iterator[Row]:
    """Yield the shares of every peer in every layer whose experts are loaded unequally.

    Args:
        cases: the layers.
        peers: ours and others.
        device: `"cpu"` or `"cuda"`.
        num_rounds: of profiles, at most.
        watch: looks after the machine while they are taken.
    """
    for case in (case for case in cases if case.routing == "skewed"):
        print(f"profile layer {case.name} {case.dtype}", file=sys.stderr, flush=True)
        inputs = make_inputs(case, device)
        rows = {peer.name: Row(SUITE, f"layer {case.name}", peer.name, case.dtype) for peer in peers}
        try:
            expected = reference_results(case, inputs)
            layers = {peer.name: admit(peer, case, inputs, expected, rows[peer.name]) for peer in peers}
            runs = {name: passes(layer, inputs) for name, layer in layers.items() if layer is not None}
            ceiling = matmul_of(case.flops, inputs.hidden_states, CEILING)
            failed = _profile(runs, ceiling, device, num_rounds, watch, rows)
            for name, reason in failed.items():
                rows[name].fail(reason)
        except (Exception, KeyboardInterrupt):
            yield from settled(rows.values(), _FILLED)
            raise
        yield from rows.values()


def run_step_profiles(
    cases: Iterable[StepCase],
    peers_of: Callable[[str], list[ModelPeer]],
    device: str,
    num_rounds: int,
    watch: Watch | None = None,
) -> Iterator[Row]:
    """Yield the shares of every peer in a step of every model.

    Args:
        cases: the models.
        peers_of: ours and others of a family.
        device: `"cpu"` or `"cuda"`.
        num_rounds: of profiles, at most.
        watch: looks after the machine while they are taken.
    """
    for case, peers in beside_others(cases, peers_of, device):
        print(f"profile step {name_of(case)} {case.dtype}", file=sys.stderr, flush=True)
        weights, tokens = make_weights(case, device), make_tokens(case, device)
        rows = {peer.name: Row(SUITE, f"step {name_of(case)}", peer.name, case.dtype) for peer in peers}
        flops = case.tokens * flops_per_token(our_config(case), case.sequence_length).matmul
        try:
            gate = Gate(case, weights, tokens)
            admitted = [peer for peer in peers if gate.admits(peer, rows[peer.name])]
            ceiling = matmul_of(flops, torch.empty(0, dtype=DTYPES[case.dtype], device=tokens.device), CEILING)
            for together in side_by_side(admitted, case, device) if admitted else ():
                with started(together, case, weights, tokens) as (trainings, failed):
                    runs = {name: training.step for name, training in trainings.items()}
                    failed |= _profile(runs, ceiling, device, num_rounds, watch, rows)
                tell_failures(failed, together, rows)
        except (Exception, KeyboardInterrupt):
            yield from settled(rows.values(), _FILLED)
            raise
        yield from rows.values()


def _profile(
    runs: dict[str, Run], ceiling: Callable[[], Sample], device: str, num_rounds: int, watch, rows: dict[str, Row]
) -> dict[str, str]:
    """Profile all in turn, each beside the ceiling, and fill their rows; return who raised, and why."""

    def contestant(run: Run) -> Callable[[], Sample]:
        return lambda: milliseconds_by_kind(run, device) | ceiling()

    contestants = {name: contestant(run) for name, run in runs.items()}
    rounds = interleave(contestants, min(num_rounds, _MOST_ROUNDS), watch)
    for name in runs.keys() - rounds.failed.keys():
        if _FILLED not in rows[name].values:  # ours may have been profiled beside others
            rows[name].values |= _shares([sample for sample in rounds.samples[name] if sample is not None], device)
    return rounds.failed


def _shares(samples: list[Sample], device: str) -> dict[str, float]:
    """Return the share of every kind, and the rate of the products over that of the ceiling behind each profile."""
    times = {kind: sum(sample[kind] for sample in samples) for kind in KINDS}
    shares = {f"share_of_{kind}": time / sum(times.values()) for kind, time in times.items()}
    if device == "cpu":  # on a GPU some products are in kernels that do more
        shares["products_of_ceiling"] = statistics.median(sample[CEILING] / sample[PRODUCTS] for sample in samples)
    return shares


def milliseconds_by_kind(run: Run, device: str) -> dict[str, float]:
    """Return the time of every kind of operators in one run; what an operator calls does not count to it again."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as watched:
        run()
    found = dict.fromkeys(KINDS, 0.0)
    for event in watched.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is that of the operator that launched it, too
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[kind_of(event.key)] += microseconds / 1e3
    return found


def kind_of(operator: str) -> str:
    """Return to which of `KINDS` an operator of the profiler belongs, or `REST`."""
    name = operator.removeprefix("aten::")
    if name in _PRODUCTS:
        return PRODUCTS
    return next((kind for kind, beginnings in _BEGINNINGS.items() if name.startswith(beginnings)), REST)
