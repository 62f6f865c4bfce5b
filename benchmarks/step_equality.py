"""The gate before steps are timed: a model that does not learn what the reference learns is not compared.

All begin with the same weights and tokens, and learn from cross-entropy alone; the reference is the model in float32
with plain PyTorch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from .cases import DTYPES, TOLERANCES, StepCase
from .engines import ADAM_EPSILON, LEARNING_RATE, MAX_GRAD_NORM, Training, clean, start
from .equality import filling_uninitialized_memory, poison, refuse_large, relative_error
from .peers.models import ModelPeer, TransformersModel
from .results import MEASURED, UNAVAILABLE, Row

_CHECKED_STEPS = 3

# Micro-batches of the steps that are checked, at most: in float32 and with plain PyTorch a whole step would take longer
# than all that is timed.
_CHECKED_MICRO_BATCHES = 2

# Tokens that the reference takes at a time, which holds everything in float32.
_REFERENCE_TOKENS = 8192


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
        with torch.no_grad(), peer.cross_entropy_alone(model):
            loss = float(peer.loss(model.to(DTYPES[case.dtype]), tokens))
        error = abs(loss - expected.losses[0]) / expected.losses[0]
        return refuse_large({"loss": error}, TOLERANCES[case.dtype])
    with filling_uninitialized_memory(), peer.cross_entropy_alone(model):
        peer.loss(model, tokens).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {f"gradient of {name}": relative_error(found.get(name), v) for name, v in expected.gradients.items()}
    return refuse_large(errors, TOLERANCES["fp32"])


def check_losses(training: Training, expected: list[float], tolerance: float) -> dict[str, float]:
    """Train on cross-entropy alone, as the reference does, and return the relative errors of the steps' losses.

    Raises:
        Different: one is larger than the tolerance.
    """
    with training.peer.cross_entropy_alone(training.engine.module):
        found = [float(training.step()[1]) for _ in expected]
    errors = {f"loss of step {i + 1}": abs(a - b) / b for i, (a, b) in enumerate(zip(found, expected, strict=True))}
    return refuse_large(errors, tolerance)


class Gate:
    """Compares models with the reference of one case.

    Args:
        case: whose steps are timed.
        weights: of the model.
        tokens: of a whole step, `(A * B, S)`.

    Raises:
        torch.OutOfMemoryError: memory does not hold the reference.
    """

    def __init__(self, case: StepCase, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
        self.case = replace(case, accumulation=min(case.accumulation, _CHECKED_MICRO_BATCHES))
        self.weights, self.tokens = weights, tokens[: self.case.accumulation * case.batch]
        self.device = tokens.device.type
        self.expected = Expected(self.case, weights, self.tokens, with_gradients=self.device == "cpu")
        clean(self.device)

    def admits(self, peer: ModelPeer, row: Row, count: Callable[[Training], dict[str, float]] | None = None) -> bool:
        """Compare a peer, then count; where one fails, write down why.

        Args:
            peer: who is compared.
            row: of the peer.
            count: what is counted of the model in training, as it is timed.
        """
        case, tokens = self.case, self.tokens
        if (reason := peer.unavailable(case, self.device)) is not None:
            row.status, row.reason = UNAVAILABLE, reason
            return False
        with row.recording_failure():
            errors = {}
            if self.device == "cpu":  # on a GPU it would compare the first loss, which the first step has too
                errors = check_gradients(peer, case, self.weights, tokens, self.expected, self.device)
            poison(tokens.device, DTYPES[case.dtype], 4 * case.micro_tokens * case.vocab_size)
            training = start(peer, case, self.weights, tokens)
            try:
                errors |= check_losses(training, self.expected.losses, TOLERANCES[case.dtype])
                row.values["max_error"] = max(errors.values())
                if count is not None:
                    row.values |= count(training)
            finally:
                training.end()
        clean(self.device)
        return row.status == MEASURED
