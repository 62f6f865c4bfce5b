"""The suite `step`: forward, backward and optimizer of whole models."""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

import psutil
import torch
from torch import nn

from moe_hf.planning.flops import flops_per_token

from .cases import DTYPES, TOLERANCES, StepCase
from .counting import counted_synchronisations, memory_use
from .engine_states import gradients_of, optimizer_states_of, storages, weights_of
from .engines import ADAM_EPSILON, LEARNING_RATE, MAX_GRAD_NORM, Training, start
from .equality import filling_uninitialized_memory, poison, refuse_large, relative_error
from .layer_suite import add_rates, matmul_of
from .peers.models import ModelPeer, TransformersModel, our_config
from .peers.registry import CEILING, OURS
from .results import FAILED, MEASURED, UNAVAILABLE, Row
from .timing import Rounds, Sample, Watch, interleave

SUITE = "step"
_CHECKED_STEPS = 3

# Micro-batches of the steps that are checked, at most, and tokens that the reference takes at a time: in float32 and
# with plain PyTorch a whole step would take longer than all that is timed.
_CHECKED_MICRO_BATCHES = 2
_REFERENCE_TOKENS = 8192

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
    for case in cases:
        peers = peers_of(case.family)
        if len(peers) < 2:
            continue  # only ours, beside nobody
        case = that_fits(case, device)
        size = f"{case.accumulation} micro-batches of {case.micro_tokens} tokens"
        print(f"step {name_of(case)} {case.dtype}, {size}", file=sys.stderr, flush=True)
        yield from _run_case(case, peers, device, num_rounds, watch)


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
    checked = replace(case, accumulation=min(case.accumulation, _CHECKED_MICRO_BATCHES))
    checked_tokens = tokens[: checked.accumulation * checked.batch]
    try:
        expected = Expected(checked, weights, checked_tokens, with_gradients=device == "cpu")
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.status, row.reason = FAILED, f"the reference did not fit: {str(error)[:100]}"
        yield from rows.values()
        return
    clean(device)
    try:
        admitted = [
            peer for peer in peers if _admit(peer, checked, weights, checked_tokens, expected, rows[peer.name], case)
        ]
        for together in side_by_side(admitted, case, device) if num_rounds and admitted else ():
            _time(together, case, weights, tokens, num_rounds, watch, rows)
    except KeyboardInterrupt:
        yield from (row for row in rows.values() if row.status != MEASURED or "step_ms" in row.values)
        raise
    yield from rows.values()


def make_tokens(case: StepCase, device: str) -> torch.Tensor:
    """Draw tokens of a whole step, as frequent as words, `(A * B, S)`."""
    draw = torch.Generator().manual_seed(1)
    frequencies = 1 / torch.arange(1, case.vocab_size + 1)
    tokens = torch.multinomial(frequencies, case.tokens, replacement=True, generator=draw)
    return tokens.view(-1, case.sequence_length).to(device)


def make_weights(case: StepCase, device: str) -> dict[str, torch.Tensor]:
    """Draw the weights of all models, as Transformers initialises them.

    On a GPU they are rounded to the precision of training, so that they can stay there for all who begin with them.
    """
    torch.manual_seed(0)
    with torch.device(device):
        weights = _reference().build(case).state_dict()
    dtype = torch.float32 if device == "cpu" else DTYPES[case.dtype]
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _reference() -> TransformersModel:
    return TransformersModel("reference", "eager")


class Expected:
    """Of the model in float32 with plain PyTorch: the gradients, and the losses of three steps.

    Args:
        case: the model.
        weights: of the model.
        tokens: of every step, `(A * B, S)`; of gradients too the mean over all of them is taken.
        with_gradients: whether they are asked for.
    """

    def __init__(
        self, case: StepCase, weights: dict[str, torch.Tensor], tokens: torch.Tensor, *, with_gradients: bool = True
    ) -> None:
        peer = _reference()
        model = peer.load(case, weights, tokens.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0)
        self.losses, self.gradients = [], {}
        for step in range(_CHECKED_STEPS):
            loss = 0.0
            # All sequences are equally long.
            for sequences in tokens.split(max(1, _REFERENCE_TOKENS // case.sequence_length)):
                part = peer.loss(model, sequences) * (len(sequences) / len(tokens))
                part.backward()
                loss += float(part.detach())
            if step == 0 and with_gradients:
                self.gradients = {name: p.grad.to("cpu", copy=True) for name, p in model.named_parameters()}
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss)


def _admit(peer: ModelPeer, case: StepCase, weights, tokens, expected: Expected, row: Row, timed: StepCase) -> bool:
    """Compare a peer with the reference and count; where it fails, write down why.

    Args:
        peer: who is compared.
        case: whose steps are checked.
        weights: of the model.
        tokens: of these steps.
        expected: what the reference has found.
        row: of the peer.
        timed: whose steps are timed and counted, of as many micro-batches or more.
    """
    device = tokens.device.type
    if (reason := peer.unavailable(case, device)) is not None:
        row.status, row.reason = UNAVAILABLE, reason
        return False
    training = None
    try:
        # On a GPU it would compare the first loss, which the first step has too.
        errors = check_gradients(peer, case, weights, tokens, expected, device) if device == "cpu" else {}
        poison(tokens.device, DTYPES[case.dtype], 4 * case.micro_tokens * case.vocab_size)
        training = start(peer, case, weights, tokens)
        errors |= check_losses(training, expected.losses, TOLERANCES[case.dtype])
        row.values["max_error"] = max(errors.values())
        row.values |= count_step(training, timed.accumulation)
    except Exception as error:  # whatever another library raises is a result of this measurement
        row.status, row.reason = FAILED, f"{type(error).__name__}: {str(error)[:200]}"
        return False
    finally:
        if training is not None:
            training.end()
        clean(device)
    return True


def check_gradients(
    peer: ModelPeer,
    case: StepCase,
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    expected: Expected,
    device: str,
) -> dict[str, float]:
    """Return the relative errors of the gradients of all weights, of the model in float32 and of cross-entropy alone.

    On a GPU only that of the loss, in the precision of training: most kernels there are of 16 bits, in which a rounded
    layer lets the next one choose other experts. What they compute is compared in the suite `layer`.

    Raises:
        Different: one is larger than the precision allows.
    """
    model = peer.load(case, weights, tokens.device)
    if device == "cuda":
        with torch.no_grad():
            loss = float(peer.cross_entropy(model.to(DTYPES[case.dtype]), tokens)[1])
        error = abs(loss - expected.losses[0]) / expected.losses[0]
        return refuse_large({"loss": error}, TOLERANCES[case.dtype])
    with filling_uninitialized_memory():
        peer.cross_entropy(model, tokens)[1].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {f"gradient of {name}": relative_error(found.get(name), v) for name, v in expected.gradients.items()}
    return refuse_large(errors, TOLERANCES["fp32"])


def check_losses(training: Training, expected: list[float], tolerance: float) -> dict[str, float]:
    """Train for some steps, and return the relative errors of their cross-entropies.

    Raises:
        Different: one is larger than the tolerance.
    """
    found = [float(training.step()[1]) for _ in expected]
    errors = {f"loss of step {i + 1}": abs(a - b) / b for i, (a, b) in enumerate(zip(found, expected, strict=True))}
    return refuse_large(errors, tolerance)


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


def clean(device: str) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


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
    trainings: dict[str, Training] = {}
    try:
        for peer in peers:
            trainings[peer.name] = start(peer, case, weights, tokens)
        contestants: dict[str, Callable[[], Sample]] = {
            name: lambda training=training: training.step()[0] for name, training in trainings.items()
        }
        contestants[CEILING] = matmul_of(flops, like, "step_ms")
        rounds = interleave(contestants, num_rounds, watch)
    except torch.OutOfMemoryError as error:
        # Ours may still be timed with others.
        for row in (rows[peer.name] for peer in peers if peer.name != OURS or len(peers) == 1):
            row.status, row.reason = FAILED, f"memory does not hold those it is timed with: {str(error)[:100]}"
        return
    finally:
        for training in trainings.values():
            training.end()
        clean(tokens.device.type)
    rows.setdefault(CEILING, Row(SUITE, name_of(case), CEILING, case.dtype))
    for row in (rows[name] for name in contestants):
        if "step_ms" not in row.values:
            _add_times(row, rounds, case, flops)


def _add_times(row: Row, rounds: Rounds, case: StepCase, flops: float) -> None:
    for metric in ("forward_ms", "forward_backward_ms", "step_ms"):
        if (median := rounds.median(row.peer, metric)) is not None:
            row.values[metric] = median
        if row.peer != OURS and (ratio := rounds.ratio(OURS, row.peer, metric)) is not None:
            row.ratios[metric] = ratio
    add_rates(row, rounds, "step_ms", case.tokens, flops)
