"""The self-test of `moe-hf doctor` on real processes: green as it is, red for each thing that is broken on purpose.

What is broken stands in `doctor_faults/sitecustomize.py`, which Python imports in the launched processes; the command
itself and the one process that they are compared with stay whole.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

from moe_hf.configuration_moe import MoEConfig
from moe_hf.doctor.space import checkpoint_bytes, export_bytes, num_parameters

FAULTS = ROOT / "tests" / "distributed" / "doctor_faults"
ZERO3_EP = ("--config_name", "quickstart", "--deepspeed", "ds_configs/zero3_ep.json", "--gpus", "2")
CHECKS = {"processes", "loss", "gradient norm", "training steps", "export", "resume"}


def doctor(*words: str | Path, fault: str = "", timeout: int = 300) -> tuple[int, dict, str]:
    """Run the command with `--json`; return its exit code, what it prints, and what it says besides."""
    variables = environment()
    if fault:
        variables["DOCTOR_FAULT"] = fault
        variables["PYTHONPATH"] = os.pathsep.join([str(FAULTS), variables.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "moe_hf", "doctor", "--json", *map(str, words)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout), done.stderr


def self_test(report: dict) -> dict[str, dict]:
    return {finding["name"]: finding for finding in report["findings"] if finding["area"] == "self-test"}


def red(report: dict) -> set[str]:
    return {name for name, finding in self_test(report).items() if finding["status"] == "wrong"}


@pytest.mark.slow
def test_a_healthy_run_on_two_processes(tmp_path):
    folders = ("--output_dir", tmp_path / "out", "--work_dir", tmp_path / "work")
    code, report, said = doctor(*ZERO3_EP, *folders, "--gradient_checkpointing")
    assert code == 0 and report["well"], report
    found = self_test(report)
    assert found.keys() == CHECKS and {finding["status"] for finding in found.values()} == {"ok"}
    numbers = report["self_test"]
    assert numbers["ranks"] == 2 and numbers["layout"].startswith("2 processes, EP 2, ZeRO 3, 4 layers (2 sparse)")
    assert numbers["losses"] == pytest.approx(numbers["losses_of_one_process"], rel=2e-6)
    assert numbers["grad_norms"] == pytest.approx(numbers["grad_norms_of_one_process"], rel=2e-6)
    assert all(measured["right"] for measured in numbers["exchange"].values()) and len(numbers["exchange"]) == 2
    for phase in ("one process", "joining the others, after compiling what DeepSpeed has not yet compiled here"):
        assert f"self-test: {phase} …" in said
    # What lasts shorter than from one look to the next is not told.
    assert re.search(r"self-test: training, \w+", said) and re.search(r"self-test: resuming, \w+", said), said

    # What the doctor says that a checkpoint takes is what this one takes.
    checkpoint = tmp_path / "work" / "train" / "checkpoint-2"
    parameters = num_parameters(MoEConfig.from_pretrained(checkpoint / "hf"))
    tensors = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.suffix in (".pt", ".safetensors"))
    assert checkpoint_bytes(parameters, in_16_bits=False, zero_stage=3) == pytest.approx(tensors, rel=0.05)
    weights = (tmp_path / "work" / "train" / "hf" / "model.safetensors").stat().st_size
    assert export_bytes(parameters, in_16_bits=False) == pytest.approx(weights, rel=0.05)


@pytest.mark.slow
def test_the_wrong_router_shows_on_one_process(tmp_path):
    words = (*ZERO3_EP, "--self_test_ranks", "1", "--output_dir", tmp_path / "out")
    code, report, _ = doctor(*words, fault="upstreams_router")
    assert code == 1 and not report["well"]
    # Another loss has another gradient and leads elsewhere; what it led to is exported and resumed rightly.
    assert red(report) == {"loss", "gradient norm", "training steps"}
    assert "the expert-parallel layer computes another function" in self_test(report)["loss"]["remedy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "expected", "sentence"),
    [
        ("upstreams_router", {"loss", "gradient norm", "training steps"}, "in one process"),
        ("averaged_norm", {"gradient norm"}, "in one process"),
        ("experts_twice", {"export"}, "4 of 47 tensors are not what the ranks hold"),
        # The run itself refuses to call such a checkpoint whole.
        ("half_of_the_experts", {"training steps"}, "but the model's is"),
        ("forgotten_moments", {"resume"}, "from those of the run that was not stopped"),
    ],
)
def test_every_fault_turns_its_own_check_red(fault, expected, sentence, tmp_path):
    code, report, _ = doctor(*ZERO3_EP, "--output_dir", tmp_path, fault=fault)
    assert code == 1 and red(report) == expected, self_test(report)
    assert any(sentence in self_test(report)[name]["found"] for name in expected), self_test(report)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_phase(tmp_path):
    code, report, _ = doctor(*ZERO3_EP, "--output_dir", tmp_path, "--timeout", 45, fault="a_rank_hangs")
    assert code == 1 and red(report) == {"training steps"}
    found = self_test(report)["training steps"]["found"]
    assert "nothing moved any more: rank 1 in 'train: step 3' (at <lambda>, doctor_faults/sitecustomize.py:" in found
    assert self_test(report)["resume"]["status"] == "skipped" and report["self_test"]["last_lines"]


@pytest.mark.slow
def test_a_rank_that_dies_is_named_with_its_error(tmp_path):
    code, report, _ = doctor(*ZERO3_EP, "--output_dir", tmp_path, fault="a_rank_dies")
    assert code == 1 and red(report) == {"training steps"}
    found = self_test(report)["training steps"]["found"]
    assert found == "rank 1 in 'train: step 3': RuntimeError: the card has fallen off the bus"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ("--config_name", "qwen3-30b-a3b", "--deepspeed", "ds_configs/qwen3-30b-a3b.json", "--gpus", "16")),
        (4, ("--config_name", "mixtral-8x7b", "--deepspeed", "ds_configs/mixtral-8x7b.json", "--gpus", "16")),
        (2, ("--config_name", "xlarge-70b", "--deepspeed", "ds_configs/xlarge-70b.json", "--gpus", "16")),
        (2, ("--config_name", "gpt-40m", "--deepspeed", "ds_configs/zero2.json", "--gpus", "4")),
    ],
    ids=["qwen3", "mixtral", "offload", "dense"],
)
def test_recipes_on_a_login_node(ranks, words, tmp_path):
    """Of a run that is much larger than this machine, its disk too: only the self-test has to be well."""
    words = (*words, "--bf16", "--gradient_checkpointing", "--self_test_ranks", ranks, "--output_dir", tmp_path)
    _, report, _ = doctor(*words)
    assert not red(report) and self_test(report).keys() == {*CHECKS, "not as the run"}, self_test(report)
