"""The suite `step`: forward, backward and optimizer of whole models."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import psutil
import torch

from moe_hf.planning.flops import flops_per_token

from .cases import DTYPES, StepCase
from .counting import counted_synchronisations, memory_use
from .engine_states import gradients_of, optimizer_states_of, storages, weights_of
from .engines import Training, clean, start
from .layer_suite import add_rates, matmul_of
from .peers.models import ModelPeer, our_config
from .peers.registry import CEILING, OURS
from .results import MEASURED, Row, settled
from .step_equality import Gate, make_tokens, make_weights
from .timing import Rounds, Sample, Watch, interleave, reason_of

SUITE = "step"

# Weights, gradients, the optimizer's copy and its two moments; of a device's memory, what may be used.
_STATE_BYTES = 16
_USABLE = 0.9

# Of fewer tokens are micro-batches not made where memory is short.
_SMALLEST_MICRO_BATCH = 8192


def run_steps(
    cases: Iterable[StepCase],
    peers_of: Callable[[str], list[ModelPeer]],
    device: str,
    num_rounds: int,
    watch: Watch | None = None,
) -> Iterator[Row]:
    """Check, count and time every peer in every case; yield the rows of a case when it is done.

    Args:
        cases: the models.
        peers_of: ours and others of a family.
        device: `"cpu"` or `"cuda"`.
        num_rounds: of timing; 0 to check and count only.
        watch: looks after the machine while times are taken.
    """
    for case, peers in beside_others(cases, peers_of, device):
        size = f"{case.accumulation} micro-batches of {case.micro_tokens} tokens"
        print(f"step {name_of(case)} {case.dtype}, {size}", file=sys.stderr, flush=True)
        yield from _run_case(case, peers, device, num_rounds, watch)


def beside_others(
    cases: Iterable[StepCase], peers_of: Callable[[str], list[ModelPeer]], device: str
) -> Iterator[tuple[StepCase, list[ModelPeer]]]:
    """Yield cases as memory holds them, and their peers, but none where ours would be beside nobody."""
    for case in cases:
        peers = peers_of(case.family)
        if len(peers) >= 2:
            yield that_fits(case, device), peers


def name_of(case: StepCase) -> str:
    """Return the name of a case in the table; with its layers, which memory may have cut."""
    return f"{case.name}/{case.family}/L{case.layers}"


def that_fits(case: StepCase, device: str) -> StepCase:
    """Halve the micro-batches of a step, then take layers away, until ours and one peer find room side by side."""
    while device == "cuda" and _models_that_fit(case, device) < 2:
        if case.batch % 2 == 0 and case.micro_tokens // 2 >= _SMALLEST_MICRO_BATCH:
            case = replace(case, batch=case.batch // 2, accumulation=2 * case.accumulation)
        elif case.layers > 1:
            case = replace(case, layers=case.layers - 1)
        else:
            break
    return case


def _models_that_fit(case: StepCase, device: str) -> int:
    """Return how many models memory holds in training, one of them with its activations, beside the given weights."""
    memory = torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().available
    weights = DTYPES[case.dtype].itemsize * case.parameters
    return int((_USABLE * memory - weights - case.activation_bytes) / (_STATE_BYTES * case.parameters))


def _run_case(case: StepCase, peers: list[ModelPeer], device: str, num_rounds: int, watch) -> Iterator[Row]:
    tokens = make_tokens(case, device)
    weights = make_weights(case, device)
    rows = {peer.name: Row(SUITE, name_of(case), peer.name, case.dtype) for peer in peers}
    try:
        gate = Gate(case, weights, tokens)
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.fail(f"the reference did not fit: {str(error)[:100]}")
        yield from rows.values()
        return

    def count(training: Training) -> dict[str, float]:
        return count_step(training, case.accumulation)

    try:
        admitted = [peer for peer in peers if gate.admits(peer, rows[peer.name], count)]
        for together in side_by_side(admitted, case, device) if num_rounds and admitted else ():
            _time(together, case, weights, tokens, num_rounds, watch, rows)
    except (Exception, KeyboardInterrupt):
        yield from settled(rows.values(), "step_ms")
        raise
    yield from rows.values()


def count_step(training: Training, accumulation: int) -> dict[str, float]:
    """Return what does not depend on time: synchronisations of a step, and the most bytes with all states.

    Args:
        training: of as many micro-batches, or of fewer, two at least.
        accumulation: micro-batches of the step that is told of; all but the last are alike.
    """
    device, engine = training.tokens.device.type, training.engine
    first, *others = training.tokens.split(training.batch)

    def forward(tokens: torch.Tensor = first) -> torch.Tensor:
        return training.peer.loss(engine, tokens)

    def backward(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    def the_rest(loss: torch.Tensor) -> None:
        backward(loss)
        for tokens in others:
            backward(forward(tokens))

    counts = []
    for tokens in (first, *others):
        with counted_synchronisations(device) as counted:
            backward(forward(tokens))
        counts += counted
    synchronisations = sum(counts) + (accumulation - len(counts)) * counts[0]
    states = storages(chain(weights_of(engine), gradients_of(engine), optimizer_states_of(engine)))
    memory = memory_use(device, forward, the_rest)
    return {"synchronisations": synchronisations, "peak_bytes": sum(states.values()) + memory.peak}


def side_by_side(peers: list[ModelPeer], case: StepCase, device: str) -> list[list[ModelPeer]]:
    """Return who is trained in the same rounds: all where memory holds them, else ours with a few others each time."""
    ours, others = [p for p in peers if p.name == OURS], [p for p in peers if p.name != OURS]
    size = max(1, _models_that_fit(case, device) - len(ours))
    return [[*ours, *others[i : i + size]] for i in range(0, len(others), size)] or [ours]


def _time(
    peers: list[ModelPeer], case: StepCase, weights, tokens, num_rounds: int, watch: Watch | None, rows: dict[str, Row]
) -> None:
    """Train the peers side by side and fill their rows; who is trained with others once more keeps the first times."""
    flops = case.tokens * flops_per_token(our_config(case), case.sequence_length).total
    like = torch.empty(0, dtype=DTYPES[case.dtype], device=tokens.device)
    rows.setdefault(CEILING, Row(SUITE, name_of(case), CEILING, case.dtype))
    with started(peers, case, weights, tokens) as (trainings, failed):
        contestants: dict[str, Callable[[], Sample]] = {
            name: lambda training=training: training.step()[0] for name, training in trainings.items()
        }
        contestants[CEILING] = matmul_of(flops, like, "step_ms")
        rounds = interleave(contestants, num_rounds, watch)
    tell_failures(failed | rounds.failed, peers, rows)
    for row in (rows[name] for name in contestants if name not in rounds.failed):
        if row.status == MEASURED and "step_ms" not in row.values:
            _add_times(row, rounds, case, flops)


@contextmanager
def started(
    peers: list[ModelPeer], case: StepCase, weights: dict[str, torch.Tensor], tokens: torch.Tensor
) -> Iterator[tuple[dict[str, Training], dict[str, str]]]:
    """Start all peers side by side; yield those that train, and why others do not."""
    trainings, failed = {}, {}
    try:
        for peer in peers:
            try:
                trainings[peer.name] = start(peer, case, weights, tokens)
            except Exception as error:  # whatever another library raises is a result of this measurement
                failed[peer.name] = reason_of(error)
        yield trainings, failed
    finally:
        for training in trainings.values():
            training.end()
        clean(tokens.device.type)


def tell_failures(failed: dict[str, str], peers: list[ModelPeer], rows: dict[str, Row]) -> None:
    """Write down who raised; where memory does not hold ours beside others, it is they who are not measured."""
    others = [peer.name for peer in peers if peer.name != OURS]
    for name, reason in failed.items():
        if not reason.startswith(torch.OutOfMemoryError.__name__):
            rows[name].fail(reason)
            continue
        # Ours may still be timed with others.
        for blamed in others if name == OURS and others else [name]:
            rows[blamed].fail(f"memory does not hold those it is timed with: {reason}")


def _add_times(row: Row, rounds: Rounds, case: StepCase, flops: float) -> None:
    for metric in ("forward_ms", "forward_backward_ms", "step_ms"):
        if (median := rounds.median(row.peer, metric)) is not None:
            row.values[metric] = median
        if row.peer != OURS and (ratio := rounds.ratio(OURS, row.peer, metric)) is not None:
            row.ratios[metric] = ratio
    add_rates(row, rounds, "step_ms", case.tokens, flops)
