"""Switches for speed on two ranks: compiled parts change no number, and traces hold the steps that were asked for."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from launching import ROOT, run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, recipe

from moe_hf import MoEForCausalLM

SPEED_WORKER = ROOT / "tests" / "distributed" / "speed_worker.py"
# ZeRO stage, expert parallelism, changes of the command line.
CASES = {
    "zero2-ep2": (2, 2, {}),
    "zero3-ep2": (3, 2, {"profile_steps": "3:5"}),
    "zero3-checkpointed": (3, None, {"gradient_checkpointing": True}),
}
# The others add little to it; run with --slow.
ALWAYS = "zero3-ep2"
EACH = [pytest.param(name, marks=() if name == ALWAYS else pytest.mark.slow) for name in CASES]
RECIPE = recipe([], accumulation=2)


@pytest.fixture(scope="module")
def folder(request, small_model, rows_file, tmp_path_factory) -> Path:
    """Where the cases have left `NAME/` and `results/NAME/`."""
    folder = tmp_path_factory.mktemp("speed")
    lines = []
    for name, (stage, ep, changes) in CASES.items():
        if name != ALWAYS and not request.config.getoption("--slow"):
            continue
        path = folder / f"{name}.json"
        path.write_text(json.dumps(deepspeed_json(stage, ep)))
        words = flags(
            RECIPE,
            ranks=2,
            model_name_or_path=small_model,
            train_file=rows_file,
            validation_file=rows_file,
            max_eval_samples=6,
            do_eval=True,
            output_dir=folder / name,
            deepspeed=path,
            torch_compile_backend="aot_eager",
            **changes,
        )
        lines.append({"name": name, "argv": words})
    run_cases(2, lines, folder / "results", worker=SPEED_WORKER)
    return folder


@pytest.fixture(scope="module")
def expected(small_model, rows) -> oracle.Trajectory:
    """What one process does that compiles nothing."""
    return oracle.train(MoEForCausalLM.from_pretrained(small_model).train(), replace(RECIPE, rows=rows))


@pytest.mark.parametrize("name", EACH)
def test_compiled_runs_equal_one_process(name, folder, expected):
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == NUM_STEPS
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=2e-6)
    assert [step["grad_norm"] for step in steps] == pytest.approx(expected.grad_norms, rel=2e-6)
    # What hooks inside of attention see.
    assert all(0 < step["attention_sink"] < 1 for step in steps)
    weights = load_file(folder / name / "hf" / "model.safetensors")
    assert weights.keys() == expected.weights.keys()
    for key, tensor in weights.items():
        assert (tensor - expected.weights[key]).norm() <= 1e-5 * expected.weights[key].norm(), key


@pytest.mark.parametrize("name", EACH)
def test_every_rank_compiled_each_region_once(name, folder):
    """Norms, dense MLPs, shared experts and projections, in training and in evaluation: not by layer, not by length."""
    for stats in json.loads((folder / "results" / name / "compiler.json").read_text()):
        assert stats == {"unique_graphs": 8, "graph_breaks": 0}


@pytest.mark.parametrize("name", EACH)
def test_the_export_of_a_compiled_run_is_the_live_model(name, folder):
    live = torch.load(folder / "results" / name / "live.pt")
    weights = load_file(folder / name / "hf" / "model.safetensors")
    assert weights.keys() == live["weights"].keys()
    assert all(torch.equal(tensor, live["weights"][key]) for key, tensor in weights.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_traces_hold_the_steps_asked_for(rank, folder):
    with gzip.open(folder / "zero3-ep2" / "profile" / f"rank{rank}.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = {e["name"]: e for e in events if e["name"].startswith("ProfilerStep#")}
    assert list(steps) == ["ProfilerStep#3", "ProfilerStep#4"]
    assert [e["name"] for e in events].count("ProfilerStep#3") == 1
    operators = {name: [e["ts"] for e in events if e["name"] == name] for name in ("aten::mm", "c10d::alltoall_base_")}
    for step in steps.values():
        for name, times in operators.items():
            inside = [ts for ts in times if step["ts"] <= ts <= step["ts"] + step["dur"]]
            assert inside, f"{name} is not in {step['name']}"


def test_only_the_run_that_was_asked_to_writes_traces(folder):
    assert [path.parent.name for path in folder.glob("*/profile")] == ["zero3-ep2"]
