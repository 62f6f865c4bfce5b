"""Smoothed labels and a z-loss of the predictions train as in one process, whatever ranks share, and evaluate plainly.

They are part of a loss that every kind of parallelism cuts in its own way: into rows, into pieces of rows, or to one
stage of a pipeline; and the weight that it is computed from may be in slices.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from launching import ROOT, run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, make_rows, recipe, small_config

from moe_hf import MoEForCausalLM

WORKER = ROOT / "tests" / "distributed" / "prediction_losses_worker.py"
SMOOTHING, Z_COEF = 0.1, 1e-3
ACCUMULATION = 2
SIZE = 2  # ranks that share matrices, sequences or layers
FAR = 50  # times what is tolerated
# As in the tests of each kind of parallelism.
TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-5
FAMILY_TOLERANCE = {"rows": 1e-6, "tensor": 1e-6, "sequence": 1e-6, "pipeline": 2e-6}


@dataclass(frozen=True)
class Cell:
    """One run; `shares` is what `SIZE` ranks have together, "rows" nothing; `ep` `None` is AutoEP off."""

    shares: str
    zero: int
    ep: int | None
    ranks: int = 2

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        return f"{self.shares}-ranks{self.ranks}-zero{self.zero}-ep_{ep}"

    @property
    def readers(self) -> int:
        """Ranks, or groups of them, that read rows of their own."""
        return self.ranks if self.shares == "rows" else self.ranks // SIZE


# Of each kind two ranks, and what only four have: replicas of experts, groups that read different rows. DeepSpeed keeps
# the groups of ranks that share matrices as long as a process lives: these come last.
CELLS = [
    Cell("pipeline", 1, None),
    Cell("rows", 3, 2),
    Cell("sequence", 2, 2),
    Cell("tensor", 1, None),
    Cell("pipeline", 1, 2, ranks=4),
    Cell("rows", 3, 2, ranks=4),
    Cell("sequence", 3, 2, ranks=4),
    Cell("tensor", 3, 2, ranks=4),
]
# From the flag to the model a pipeline has a way of its own, in training and in evaluation.
QUICK = CELLS[0]


def each() -> pytest.MarkDecorator:
    """Return what runs a test for every cell, for all but one if asked."""
    marks = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.name, marks=marks[c == QUICK]) for c in CELLS])


@pytest.fixture(scope="module")
def lab(small_model, rows_file, tmp_path_factory):
    """Function from a cell to its output folder; launches all with as many ranks, pipelines by themselves."""
    folder = tmp_path_factory.mktemp("prediction_losses")
    evaluation = folder / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in make_rows(7)))

    def case(cell: Cell) -> dict:
        path = folder / f"{cell.name}.json"
        path.write_text(json.dumps(deepspeed_json(cell.zero, cell.ep)))
        words = {
            "model_name_or_path": small_model,
            "train_file": rows_file,
            "output_dir": folder / cell.name,
            "deepspeed": path,
            "label_smoothing_factor": SMOOTHING,
            "config_overrides": f"output_z_loss_coef={Z_COEF}",
            "validation_file": evaluation,
            "do_eval": True,
            # In the middle too, after which training must go on with its own loss.
            "eval_strategy": "steps",
            "eval_steps": NUM_STEPS // 2,
            "per_device_eval_batch_size": 2,
        }
        if cell.shares != "rows":
            words[f"{cell.shares}_parallel_size"] = SIZE
        return {"name": cell.name, "argv": flags(recipe([], ACCUMULATION), cell.readers, **words)}

    @cache
    def launch(ranks: int, in_stages: bool) -> None:
        # DeepSpeed remembers groups of experts' replicas by their size, and in a pipeline they are of other ranks.
        cells = [c for c in CELLS if (c.ranks, c.shares == "pipeline") == (ranks, in_stages)]
        run_cases(ranks, [case(cell) for cell in cells], folder / f"in_stages_{in_stages}", worker=WORKER)

    def of(cell: Cell) -> Path:
        launch(cell.ranks, cell.shares == "pipeline")
        return folder / cell.name

    return of


@pytest.fixture(scope="module")
def train_alone(small_model, rows):
    """Function from the weights of the two terms to the trajectory of one process."""

    @cache
    def train(smoothing: float = SMOOTHING, z_coef: float = Z_COEF) -> oracle.Trajectory:
        given = replace(recipe(rows, ACCUMULATION), label_smoothing=smoothing, output_z_coef=z_coef)
        return oracle.train(MoEForCausalLM.from_pretrained(small_model).train(), given)

    return train


def logged(output: Path, kind: str) -> list[dict]:
    """Return the log entries of a run that have a `kind`, `loss` or `eval_loss`."""
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if kind in entry]


def distances(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return how far apart two models are, matrix by matrix, by the size of the second's."""
    return {name: ((tensor - expected[name]).norm() / expected[name].norm()).item() for name, tensor in weights.items()}


@pytest.mark.parametrize("without", [(0.0, Z_COEF), (SMOOTHING, 0.0)], ids=["z_loss_only", "smoothing_only"])
def test_a_missing_term_would_show(train_alone, without):
    """Far above what rounding explains, in all that is compared."""
    whole, part = train_alone(), train_alone(*without)
    for name in ("losses", "grad_norms"):
        pairs = zip(getattr(whole, name), getattr(part, name), strict=True)
        assert max(abs(ours / theirs - 1) for ours, theirs in pairs) > FAR * TOLERANCE, name
    assert max(distances(whole.weights, part.weights).values()) > FAR * WEIGHT_TOLERANCE


@each()
def test_trajectory_equals_one_process(cell, lab, train_alone):
    output, expected = lab(cell), train_alone()
    steps = logged(output, "loss")
    assert len(steps) == NUM_STEPS
    assert [entry["loss"] for entry in steps] == pytest.approx(expected.losses, rel=TOLERANCE)
    assert [entry["grad_norm"] for entry in steps] == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    for entry, families in zip(steps, expected.family_norms, strict=True):
        norms = {family: entry[f"grad_norm/{family}"] for family in families}
        assert norms == pytest.approx(families, rel=FAMILY_TOLERANCE[cell.shares])
        assert math.hypot(*norms.values()) == pytest.approx(entry["grad_norm"], rel=TOLERANCE)
    apart = distances(load_file(output / "hf" / "model.safetensors"), expected.weights)
    assert apart.keys() == expected.weights.keys()
    assert max(apart.values()) <= WEIGHT_TOLERANCE, max(apart, key=apart.get)


@each()
def test_log_tells_both_terms(cell, lab, train_alone):
    """`ce_loss` is of the smoothed labels, `output_z_loss` is without its weight."""
    config, expected = small_config(), train_alone()
    steps = logged(lab(cell), "loss")
    assert [entry["ce_loss"] for entry in steps] == pytest.approx(expected.cross_entropies, rel=TOLERANCE)
    assert [entry["output_z_loss"] for entry in steps] == pytest.approx(expected.output_z_losses, rel=TOLERANCE)
    for entry in steps:
        router = config.router_aux_loss_coef * entry["aux_loss"] + config.router_z_loss_coef * entry["z_loss"]
        parts = entry["ce_loss"] + Z_COEF * entry["output_z_loss"] + router
        assert parts == pytest.approx(entry["loss"], rel=1e-5)


@each()
def test_evaluation_is_of_plain_labels(cell, lab):
    """Seven rows fill no last batch; each counts once."""
    output = lab(cell)
    model = MoEForCausalLM.from_pretrained(output / "hf").eval()
    assert model.config.output_z_loss_coef == Z_COEF
    total, smoothed, count = 0.0, 0.0, 0
    for row in make_rows(7):
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        smoothed += F.cross_entropy(logits, labels, reduction="sum", label_smoothing=SMOOTHING).item()
        count += (labels != -100).sum().item()
    middle, *last = logged(output, "eval_loss")
    assert middle["step"] == NUM_STEPS // 2 and last
    for entry in last:
        assert entry["eval_loss"] == pytest.approx(total / count, rel=1e-5)
        assert entry["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert middle["eval_loss"] != last[0]["eval_loss"]
    assert abs(smoothed / total - 1) > 1e-3, "which would show"
