"""Each check of the self-test sees what it is there for, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.export import export_model
from moe_hf.doctor.exported import GATHERED_NAME
from moe_hf.doctor.findings import OK, WRONG
from moe_hf.doctor.layout import Layout
from moe_hf.doctor.one_process import Recipe, Trajectory
from moe_hf.doctor.trial import RESUME, TRAIN, Trial
from moe_hf.doctor.verdict import EXPORT, NORM, PARITY, RESUMING, STEPS, judge

EVERYTHING = {PARITY, NORM, STEPS, EXPORT, RESUMING}
EXPERTS = "model.layers.1.mlp.experts.down_proj"
STEPS_MADE = [{"step": i + 1, "loss": 5.0 - i / 10, "grad_norm": 2.0 + i / 10} for i in range(4)]


@pytest.fixture
def trial() -> Trial:
    recipe = Recipe(num_steps=4, micro_batches_per_step=1, data_ranks=2, rows_per_rank=2)
    return Trial(small_config(), {"zero_optimization": {"stage": 3}}, Layout(2, expert=2), recipe, "float32", False)


@pytest.fixture
def healthy(trial, tmp_path) -> tuple[Path, Trajectory]:
    """What a self-test leaves in which nothing is wrong, and the trajectory of one process."""
    torch.manual_seed(3)
    model = MoEForCausalLM(trial.config)
    (tmp_path / "results").mkdir()
    for name in (TRAIN, RESUME):
        export_model(model, tmp_path / name / "hf")
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, gathered(tmp_path, name))
        write_steps(tmp_path, name, STEPS_MADE)
    losses, norms = ([step[key] for step in STEPS_MADE] for key in ("loss", "grad_norm"))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return tmp_path, Trajectory(losses, norms, weights)


def gathered(folder: Path, name: str) -> Path:
    return folder / name / GATHERED_NAME


def write_steps(folder: Path, name: str, steps: list[dict], device: str = "cpu") -> None:
    results = {"steps": steps, "device": device, "seconds": 1.0}
    (folder / "results" / f"{name}.json").write_text(json.dumps(results))


def changed(number: int, **values: float) -> list[dict]:
    return [step | values if i == number else step for i, step in enumerate(STEPS_MADE)]


def wrong(trial: Trial, healthy) -> set[str]:
    findings = judge(trial, *healthy)
    assert findings.keys() == EVERYTHING
    assert all(finding.remedy for finding in findings.values() if finding.status == WRONG)
    return {name for name, finding in findings.items() if finding.status != OK}


def test_a_healthy_run(trial, healthy):
    assert wrong(trial, healthy) == set()


def test_rounding_is_no_fault(trial, healthy):
    for name in (TRAIN, RESUME):
        write_steps(healthy[0], name, changed(0, loss=5.0 * (1 + 1e-6), grad_norm=2.0 * (1 - 2e-6)))
    assert wrong(trial, healthy) == set()


@pytest.mark.parametrize(
    ("number", "values", "red"),
    [
        (0, {"loss": 5.0005}, {PARITY}),
        (0, {"grad_norm": 2.001}, {NORM}),
        (2, {"loss": 4.801}, {STEPS}),
        (0, {"loss": float("nan")}, {PARITY}),
    ],
)
def test_numbers_that_are_not_one_processs(number, values, red, trial, healthy):
    for name in (TRAIN, RESUME):
        write_steps(healthy[0], name, changed(number, **values))
    # A NaN is not even equal to itself.
    assert wrong(trial, healthy) - {RESUMING} == red


def test_accelerators_add_in_another_order(trial, healthy):
    for name in (TRAIN, RESUME):
        write_steps(healthy[0], name, changed(0, loss=5.0005), device="cuda")
    assert wrong(trial, healthy) == set()
    write_steps(healthy[0], RESUME, changed(3, loss=4.7001), device="cuda")
    assert wrong(trial, healthy) == set()
    write_steps(healthy[0], RESUME, changed(3, loss=4.75), device="cuda")
    assert wrong(trial, healthy) == {RESUMING}


@pytest.mark.parametrize("values", [{"loss": 4.7 * (1 + 1e-7)}, {"grad_norm": 2.3000001}])
def test_a_resumed_run_differs_in_the_last_bits(values, trial, healthy):
    write_steps(healthy[0], RESUME, changed(3, **values))
    assert wrong(trial, healthy) == {RESUMING}


def test_a_resumed_run_that_begins_anew(trial, healthy):
    write_steps(healthy[0], RESUME, STEPS_MADE[2:])
    assert wrong(trial, healthy) == {RESUMING}


def test_a_resumed_run_ends_with_other_weights(trial, healthy):
    tensors = load_file(gathered(healthy[0], RESUME))
    tensors[EXPERTS][0, 0, 0] += 1e-3
    save_file(tensors, gathered(healthy[0], RESUME))
    assert wrong(trial, healthy) == {RESUMING}


def test_weights_that_are_not_one_processs(trial, healthy):
    healthy[1].weights[EXPERTS] *= 1.001
    assert wrong(trial, healthy) == {STEPS}


def exported(folder: Path) -> Path:
    return folder / TRAIN / "hf" / "model.safetensors"


def test_an_export_with_the_experts_of_one_rank(trial, healthy):
    tensors = load_file(exported(healthy[0]))
    tensors[EXPERTS] = tensors[EXPERTS][:2].repeat(2, 1, 1)
    save_file(tensors, exported(healthy[0]), {"format": "pt"})
    assert wrong(trial, healthy) == {EXPORT}
    assert (
        f"1 of {len(tensors)} tensors are not what the ranks hold, such as {EXPERTS}"
        in judge(trial, *healthy)[EXPORT].found
    )


def test_an_export_that_lacks_tensors(trial, healthy):
    tensors = load_file(exported(healthy[0]))
    del tensors[EXPERTS]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()
    save_file(tensors, exported(healthy[0]), {"format": "pt"})
    assert wrong(trial, healthy) == {EXPORT}
    assert judge(trial, *healthy)[EXPORT].found.startswith("2 of ")


def test_an_export_that_does_not_load(trial, healthy):
    (healthy[0] / TRAIN / "hf" / "config.json").write_text("{}")
    assert wrong(trial, healthy) == {EXPORT}
    (healthy[0] / TRAIN / "hf" / "model.safetensors").unlink()
    assert wrong(trial, healthy) == {EXPORT}


def test_where_nothing_was_gathered_the_export_is_compared_with_one_process(trial, healthy):
    folder, expected = healthy
    for name in (TRAIN, RESUME):
        gathered(folder, name).unlink()
    assert wrong(trial, healthy) == set()
    expected.weights[EXPERTS] *= 1.001
    assert wrong(trial, healthy) == {STEPS}


def test_runs_that_did_not_come_to_their_end(trial, healthy):
    (healthy[0] / "results" / f"{RESUME}.json").unlink()
    assert judge(trial, *healthy).keys() == EVERYTHING - {RESUMING}
    (healthy[0] / "results" / f"{TRAIN}.json").unlink()
    assert judge(trial, *healthy) == {}
