"""What the runs of the self-test have left, compared: with one process, with each other, with the exported folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .exported import problem_of_export, weights_of
from .findings import OK, WRONG, Finding
from .one_process import Trajectory
from .trial import RESUME, SAVED_STEP, TRAIN, Trial
from .worker import RESULTS

AREA = "self-test"
PARITY, NORM, STEPS, EXPORT, RESUMING = "loss", "gradient norm", "training steps", "export", "resume"


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that rounding explains."""

    loss: float
    norm: float
    weights: float
    is_repeatable: bool
    """Whether the same run gives the same bits, so that a resumed one has to."""


# Seen over 10 steps in float32 on a CPU: 1.9e-7 and 2.4e-7. Kernels of accelerators add in another order, and some of
# them in another one at every run.
TOLERANCES = {
    "cpu": Tolerance(loss=5e-6, norm=1e-5, weights=1e-4, is_repeatable=True),
    "accelerator": Tolerance(loss=2e-4, norm=2e-3, weights=1e-2, is_repeatable=False),
}


@dataclass(frozen=True)
class Outcome:
    """What one run has left."""

    losses: list[float]
    norms: list[float]
    folder: Path
    device: str
    seconds: float
    exchange: dict | None

    @property
    def tolerance(self) -> Tolerance:
        """Of comparisons with it."""
        return TOLERANCES["cpu" if self.device == "cpu" else "accelerator"]


def read_outcome(folder: Path, name: str) -> Outcome | None:
    """Return what the run called `name` has left in the folder of its plan, or `None` if it has not come to its end."""
    path = folder / RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    losses, norms = ([step[key] for step in results["steps"]] for key in ("loss", "grad_norm"))
    return Outcome(losses, norms, folder / name, results["device"], results["seconds"], results.get("exchange"))


def judge(trial: Trial, folder: Path, expected: Trajectory) -> dict[str, Finding]:
    """Return a finding for every check, by its name, that the runs in `folder` have got as far as.

    Args:
        trial: what was run.
        folder: of its plan.
        expected: what one process gives.
    """
    exact, train, resumed = (read_outcome(folder, name) for name in (trial.exact, TRAIN, RESUME))
    checks: dict[str, Callable[[], Finding]] = {}
    if exact is not None:
        checks |= {PARITY: lambda: _loss(exact, expected, trial), NORM: lambda: _norm(exact, expected)}
        checks |= {STEPS: lambda: _steps(exact, expected)}
    if exact is not None and train is not None:
        checks |= {EXPORT: lambda: _export([train.folder, exact.folder], trial)}
    if train is not None and resumed is not None:
        checks |= {RESUMING: lambda: _resumed(train, resumed)}
    return {name: check() for name, check in checks.items()}


def _loss(run: Outcome, expected: Trajectory, trial: Trial) -> Finding:
    """Compare the loss of the first batch, before any step: routing, its losses, and the exchange of tokens."""
    layer = "the expert-parallel layer" if trial.layout.expert else "the distributed model"
    remedy = f"{layer} computes another function than the model; correct what is marked above, or leave it out"
    return _compared(PARITY, run.losses[0], expected.losses[0], run.tolerance.loss, remedy)


def _norm(run: Outcome, expected: Trajectory) -> Finding:
    """Compare the norm that DeepSpeed clips by with that of the first batch's whole gradient."""
    remedy = "gradients or their norm are wrong, and clipping with them; try another ZeRO stage"
    return _compared(NORM, run.norms[0], expected.grad_norms[0], run.tolerance.norm, remedy)


def _compared(name: str, value: float, expected: float, tolerance: float, remedy: str) -> Finding:
    distance = _distance(value, expected)
    found = f"{value:.6f}, in one process {expected:.6f} ({distance:.0e} apart)"
    if distance <= tolerance:
        return Finding(AREA, name, OK, found)
    return Finding(AREA, name, WRONG, f"{found}, more than {tolerance:.0e}", remedy)


def _steps(run: Outcome, expected: Trajectory) -> Finding:
    """Compare later losses and the last weights: optimizer, clipping, schedule."""
    losses = max(map(_distance, run.losses[1:], expected.losses[1:]))
    held = weights_of(run.folder)
    apart = {name: _relative(tensor, expected.weights[name]) for name, tensor in held.items()}
    worst = max(apart, key=apart.get)
    found = f"{len(run.losses)} steps: losses {losses:.0e} and weights {apart[worst]:.0e} from one process's at most"
    if losses <= run.tolerance.loss and apart[worst] <= run.tolerance.weights:
        return Finding(AREA, STEPS, OK, found)
    remedy = "the steps are others than AdamW's; look at the lines above, and at offload in the JSON"
    return Finding(AREA, STEPS, WRONG, f"{found} ({worst})", remedy)


def _export(folders: list[Path], trial: Trial) -> Finding:
    for folder in dict.fromkeys(folders):
        if (problem := problem_of_export(folder, trial.config)) is not None:
            remedy = "do not train: what a run exports here is not what it has trained"
            return Finding(AREA, EXPORT, WRONG, problem, remedy)
    return Finding(AREA, EXPORT, OK, "every tensor is there and equals what the ranks hold; from_pretrained loads it")


def _resumed(train: Outcome, resumed: Outcome) -> Finding:
    """Compare the run that went on from a checkpoint with the one that was never stopped."""
    if len(resumed.losses) != len(train.losses):
        found = f"the resumed run has made {len(resumed.losses)} steps instead of {len(train.losses)}"
        return Finding(AREA, RESUMING, WRONG, found, _DO_NOT_RESUME)
    pairs = zip(train.losses + train.norms, resumed.losses + resumed.norms, strict=True)
    ends = [weights_of(outcome.folder) for outcome in (train, resumed)]
    apart = {name: _relative(ends[1][name], tensor) for name, tensor in ends[0].items() if name in ends[1]}
    losses, worst = max(_distance(b, a) for a, b in pairs), max(apart, key=apart.get)
    if losses == apart[worst] == 0:
        found = f"from step {SAVED_STEP} on the same losses, norms and weights, bit for bit"
        return Finding(AREA, RESUMING, OK, found)
    found = f"losses {losses:.0e} and weights {apart[worst]:.0e} from those of the run that was not stopped ({worst})"
    tolerance = train.tolerance
    if tolerance.is_repeatable or losses > tolerance.norm or apart[worst] > tolerance.weights:
        return Finding(AREA, RESUMING, WRONG, found, _DO_NOT_RESUME)
    return Finding(AREA, RESUMING, OK, found)


_DO_NOT_RESUME = "a run that is stopped would not go on as if it had not been; look at disk and offload in the JSON"


def _distance(value: float, expected: float) -> float:
    """Return the relative difference; a NaN is infinitely far away."""
    distance = abs(value - expected) / max(abs(expected), 1e-12)
    return distance if distance == distance else float("inf")


def _relative(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    if tensor.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    distance = ((tensor.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    return distance if distance == distance else float("inf")
