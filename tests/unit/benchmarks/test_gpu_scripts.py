"""The scripts for a GPU, with a Python that only writes down what it is asked for."""

import os
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from benchmarks.cases import step_cases
from benchmarks.peers.registry import choose, layer_peers, model_peers
from benchmarks.run import build_parser

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "scripts"
MARK = ".".join(["pytest", "mark", "gpu"])  # not to be found in this file

PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$ASKED"
case "$*" in
    *"pip wheel"*scattermoe*) [ -z "$SCATTERMOE_FAILS" ] && touch wheels/scattermoe-0.3.0-py3-none-any.whl ;;
    *"pip wheel"*) touch wheels/deepspeed-0.0-py3-none-any.whl ;;
    *"pip download"*) touch wheels/liger_kernel-0.0-py3-none-any.whl ;;
    *"-m pytest"*) exit "${PYTEST_STATUS:-0}" ;;
    *"-m benchmarks.run"*) exit "${BENCHMARK_STATUS:-0}" ;;
esac
"""


def run(folder: Path, script: str, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run a script in a folder of its own; return how it ended, and what Python was asked for."""
    (folder / "scripts").mkdir()
    (folder / "tests").mkdir()
    shutil.copy(SCRIPTS / script, folder / "scripts")
    shutil.copy(ROOT / "setup.cfg", folder)
    python, asked = folder / "python", folder / "asked"
    python.write_text(PYTHON)
    python.chmod(0o755)
    settings = {"PATH": os.environ["PATH"], "PYTHON": str(python), "ASKED": str(asked), "SCATTERMOE_FAILS": ""}
    command = ["bash", str(folder / "scripts" / script), *words]
    done = subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=60)
    return done, asked.read_text().splitlines()


def measured(part: str, folder: Path) -> list:
    """Return the arguments of every run of the benchmarks, as these read them."""
    done, asked = run(folder, "gpu_check.sh", part)
    assert done.returncode == 0, done.stderr
    runs = [line.split()[2:] for line in asked if line.startswith("-m benchmarks.run")]
    return [build_parser().parse_args(words) for words in runs]


@pytest.mark.parametrize("part", ["all", "benchmarks"])
def test_who_matters_most_is_measured_first(tmp_path, part):
    runs = measured(part, tmp_path)
    suites = [arguments.suite for arguments in runs]
    assert (
        suites
        == {
            "all": [("layer",), ("step",)],
            "benchmarks": [("step",), ("layer",), ("step",), ("scaling",)],
        }[part]
    )
    step = next(arguments for arguments in runs if arguments.suite == ("step",))
    for case in step_cases("cuda"):
        names = [peer.name for peer in choose(model_peers(case.family), step.peers)]
        liger = [] if case.family == "olmoe" else [f"{case.family}/liger"]
        assert names == ["ours", f"{case.family}/grouped_mm", "ours/liger", *liger]
    layer = next(arguments for arguments in runs if arguments.suite == ("layer",))
    assert layer.peers[:3] == ["scattermoe", "sonicmoe", "mixtral/grouped_mm"]
    assert sum(name.endswith("/liger") for name in layer.peers) == 1
    known = {"layer": {peer.name for peer in layer_peers()}, "step": set()}
    known["step"] = {peer.name for case in step_cases("cuda") for peer in model_peers(case.family)}
    for arguments in runs[:3]:
        assert set(arguments.peers) <= known[arguments.suite[0]]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("all", ["kernels", "layer", "step", "training"]),
        ("tests", ["kernels", "training"]),
        ("benchmarks", ["step", "layer", "more_steps", "scaling"]),
    ],
)
def test_kernels_are_tested_before_they_are_measured(part, expected, tmp_path):
    done, asked = run(tmp_path, "gpu_check.sh", part)
    assert [line.removeprefix("== ") for line in done.stderr.splitlines() if line.startswith("== ")] == expected
    # What each of them asks Python for, in this order; all tests are those marked gpu.
    asked = [line.split() for line in asked if line.startswith(("-m pytest", "-m benchmarks.run"))]
    tests = [words[2 : words.index("-m", 2)] for words in asked if words[1] == "pytest"]
    assert all("-m gpu" in " ".join(words[2:]) for words in asked if words[1] == "pytest")
    assert [words[1] == "pytest" for words in asked] == [name in ("kernels", "training") for name in expected]
    if part != "benchmarks":
        assert tests[0][:2] == ["tests/gpu/test_experts_triton.py", "tests/gpu/test_liger.py"]
        assert all(name.startswith("tests/gpu/test_gpu.py") for name in tests[1])
    if part == "tests":
        marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if MARK in path.read_text()}
        assert {name for names in tests for name in names if "::" not in name} == marked
    for name in (name for names in tests for name in names if "::" in name):
        file, function, json = re.fullmatch(r"(.+)::(\w+)(?:\[(.+)-sdpa\])?", name).groups()
        assert f"def {function}(" in (ROOT / file).read_text()
        assert json is None or (ROOT / "ds_configs" / json).exists()


@pytest.mark.parametrize(
    ("status", "returned", "sentence"),
    [
        ({}, 0, "training: done"),
        ({"PYTEST_STATUS": "1"}, 1, "training: FAILED with 1"),
        ({"PYTEST_STATUS": "124"}, 1, "training: FAILED, because not all of its tests were run; with more time: "),
        ({"PYTEST_STATUS": "137"}, 1, "training: FAILED with 137"),
        ({"SECONDS": "520"}, 1, "training: FAILED, because not all of its tests were run; with more time: "),
        ({"BENCHMARK_STATUS": "1"}, 1, "step: FAILED with 1"),
        ({"BENCHMARK_STATUS": "124"}, 0, "step: stopped at its limit"),
    ],
    ids=str,
)
def test_only_what_was_run_has_passed(status, returned, sentence, tmp_path):
    """124 is what `timeout` returns at a limit, SECONDS how long Bash says that the script has run."""
    done, _ = run(tmp_path, "gpu_check.sh", **status)
    summary = (tmp_path / "benchmarks" / "results" / "summary.txt").read_text()
    assert done.returncode == returned and any(line.startswith(sentence) for line in summary.splitlines()), summary
    assert done.stdout.endswith(summary)


def test_wheels_without_scattermoe(tmp_path):
    """One sentence says so, and the others are there."""
    done, asked = run(tmp_path, "gpu_wheels.sh", SCATTERMOE_FAILS="yes")
    assert done.returncode == 0, done.stderr
    sentences = [line for line in done.stderr.splitlines() if "ScatterMoE" in line]
    assert len(sentences) == 1 and "cannot be had from git+https://github.com/shawntan/scattermoe" in sentences[0]
    assert {wheel.name.split("-")[0] for wheel in (tmp_path / "wheels").iterdir()} == {"deepspeed", "liger_kernel"}
    (build,) = [line for line in asked if "scattermoe" in line]
    assert "pip wheel" in build and "--no-deps" in build


def test_wheels_have_the_liger_that_is_known(tmp_path):
    """The loss takes another one's kernel for unknown, and would not be fused."""
    _, asked = run(tmp_path, "gpu_wheels.sh")
    (download,) = [line for line in asked if "pip download" in line]
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    (bounds,) = config["options.extras_require"]["liger"].split("\n")[1:]
    assert re.fullmatch(r"liger-kernel >=[\d.]+,<[\d.]+", bounds) and download.endswith(f" {bounds}")


def test_wheels_with_scattermoe_of_a_clone(tmp_path):
    done, asked = run(tmp_path, "gpu_wheels.sh", SCATTERMOE="git+file:///clones/scattermoe")
    assert done.returncode == 0 and "cannot be had" not in done.stderr
    assert (tmp_path / "wheels" / "scattermoe-0.3.0-py3-none-any.whl").exists()
    assert any(line.endswith("git+file:///clones/scattermoe") for line in asked)


def test_wheels_tell_who_is_not_among_them(tmp_path):
    done, asked = run(tmp_path, "gpu_wheels.sh")
    last = done.stdout.splitlines()[-1]
    others = {"sonicmoe": "SonicMoE", "megablocks": "MegaBlocks", "tutel": "Tutel"}
    assert last.startswith("Not carried along: ") and all(title in last for title in others.values())
    assert not any(name in line.lower() for name in (*others, "cutlass") for line in asked)
