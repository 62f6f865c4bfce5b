"""The matrix: every ZeRO stage × number of ranks × expert parallelism gives what one process gives.

One launch for 2 ranks and one for 4 run all cells through run_clm_moe.py's own code; the tests then look at what each
cell has left: losses, gradient norms and exported weights against the oracle, and the export against the live model.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from launching import run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, recipe, small_config

from moe_hf import MoEForCausalLM

TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3, "fp16": 5e-3}
WEIGHT_TOLERANCE = 1e-5
# Adam's first steps follow the sign of every gradient. In 16 bits many signs are rounding noise, so two runs part by
# the size of their steps; small steps leave what is to be compared.
LEARNING_RATE = {"fp32": 1e-3, "bf16": 3e-5, "fp16": 3e-5}
TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix; `ep` `None` is AutoEP off."""

    zero: int
    ranks: int
    ep: int | None
    accumulation: int
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        return f"zero{self.zero}-ranks{self.ranks}-ep_{ep}-ga{self.accumulation}-{self.dtype}"


def cells(ranks: int) -> list[Cell]:
    """Return all cells of one launch."""
    sizes = [None, *(size for size in (1, 2, 4) if ranks % size == 0)]
    matrix = [Cell(zero, ranks, ep, ga) for zero in (1, 2, 3) for ep in sizes for ga in (1, 2)]
    matrix += [Cell(0, ranks, None, ga) for ga in (1, 2)]
    matrix += [Cell(zero, ranks, ep, 2, "bf16") for zero in (1, 2, 3) for ep in (None, ranks)]
    if ranks == 2 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        matrix += [Cell(2, ranks, 2, 1, "fp16")]
    return matrix


ALL_CELLS = [cell for ranks in (2, 4) for cell in cells(ranks)]


def command_line(cell: Cell, small_model: Path, rows_file: Path, folder: Path) -> list[str]:
    """Return the words after `run_clm_moe.py`."""
    path = folder / f"{cell.name}.json"
    path.write_text(json.dumps(deepspeed_json(cell.zero, cell.ep)))
    return flags(
        recipe([], cell.accumulation, LEARNING_RATE[cell.dtype]),
        cell.ranks,
        model_name_or_path=small_model,
        train_file=rows_file,
        output_dir=folder / cell.name,
        deepspeed=path,
        bf16=cell.dtype == "bf16",
        fp16=cell.dtype == "fp16",
    )


@pytest.fixture(scope="session")
def oracles(small_model, rows):
    """Function from a cell to the trajectory of one process; cells that differ in nothing else share one."""

    @cache
    def train(accumulation: int, dtype: str, pieces: int) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(small_model).train()
        return oracle.train(model, recipe(rows, accumulation, LEARNING_RATE[dtype]), TORCH_DTYPE[dtype], pieces)

    return lambda cell: train(cell.accumulation, cell.dtype, 1 if cell.dtype == "fp32" else cell.ranks)


@pytest.fixture(scope="session")
def runs(small_model, rows_file, tmp_path_factory):
    """Function from a cell to the folder of its results and the folder of its export; launches once for each size."""
    folder = tmp_path_factory.mktemp("parity")
    launched = set()

    def of(cell: Cell) -> tuple[Path, Path]:
        if cell.ranks not in launched:
            launched.add(cell.ranks)
            lines = [
                {"name": c.name, "argv": command_line(c, small_model, rows_file, folder)} for c in cells(cell.ranks)
            ]
            run_cases(cell.ranks, lines, folder / "results")
        return folder / "results" / cell.name, folder / cell.name / "hf"

    return of


@pytest.fixture(params=ALL_CELLS, ids=lambda cell: cell.name)
def cell(request) -> Cell:
    return request.param


def test_routing_is_unbalanced(oracles):
    """Otherwise a wrong count of tokens would not show."""
    assert max(oracles(ALL_CELLS[0]).largest_loads) > 1.5


def test_trajectory_equals_one_process(cell, runs, oracles, parity_table):
    results, export = runs(cell)
    history = json.loads((results / "result.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    expected = oracles(cell)
    assert len(steps) == NUM_STEPS

    loss = max(abs(entry["loss"] / value - 1) for entry, value in zip(steps, expected.losses, strict=True))
    norm = max(abs(entry["grad_norm"] / value - 1) for entry, value in zip(steps, expected.grad_norms, strict=True))
    weights = load_file(export / "model.safetensors")
    distances = {
        name: ((tensor.float() - expected.weights[name]).norm() / expected.weights[name].norm()).item()
        for name, tensor in weights.items()
    }
    worst = max(distances, key=distances.get)
    parity_table.append((cell, loss, norm, distances[worst]))

    assert loss <= TOLERANCE[cell.dtype]
    assert norm <= TOLERANCE[cell.dtype]
    if cell.dtype == "fp32":
        assert distances[worst] <= WEIGHT_TOLERANCE, worst


def test_loss_is_the_sum_of_its_logged_parts(cell, runs):
    config = small_config()
    results, _ = runs(cell)
    for entry in json.loads((results / "result.json").read_text())["log_history"]:
        if "loss" in entry:
            parts = (
                entry["ce_loss"]
                + config.router_aux_loss_coef * (entry["aux_loss/layer_1"] + entry["aux_loss/layer_3"])
                + config.router_z_loss_coef * (entry["z_loss/layer_1"] + entry["z_loss/layer_3"])
            )
            assert parts == pytest.approx(entry["loss"], rel=1e-5)


def test_export_is_the_live_model(cell, runs):
    results, export = runs(cell)
    live = torch.load(results / "live.pt")
    model, info = MoEForCausalLM.from_pretrained(export, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    weights = load_file(export / "model.safetensors")
    assert weights.keys() == live["weights"].keys()
    for name, tensor in weights.items():
        assert tensor.dtype == live["weights"][name].dtype
        assert torch.equal(tensor, live["weights"][name]), name
    experts = weights["model.layers.1.mlp.experts.down_proj"]
    assert len({expert.float().sum().item() for expert in experts}) == len(experts)

    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 27).reshape(2, 12)).logits
    if cell.ep is None:
        assert torch.equal(logits, live["logits"])
    else:
        # AutoEP multiplies gate and up separately and sums in another order than the model it has replaced.
        tolerance = 5e-6 if cell.dtype == "fp32" else 1e-2
        torch.testing.assert_close(logits.float(), live["logits"].float(), rtol=tolerance, atol=tolerance)


def test_export_generates(cell, runs):
    _, export = runs(cell)
    model = MoEForCausalLM.from_pretrained(export)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 9)
