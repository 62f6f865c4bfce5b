"""The Triton kernels without a GPU: their results in Triton's interpreter, and that they compile for one.

Both need processes of their own: whether Triton interprets is settled when it is first imported.
"""

import ast
import json
import os
import platform
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.cases import layer_cases

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNELS = sorted((ROOT / "moe_hf" / "kernels").glob("*triton*.py"))

HOPPER = 232_448  # bytes of shared memory that a program may have
BENCHMARKED = [case for case in layer_cases("cuda") if case.routing == "skewed"]
PRODUCTS = {"_gate_and_up", "_down", "_activation_gradient", "_input_gradient", "_weight_gradient"}
NAMES = [
    "T20-H40-E4-K2-I24-uneven-packed-float32",
    "T30-H33-E4-K2-I17-uneven-separate-float32",
    "T10-H20-E10-K8-I16-uneven-separate-float32",
    "T25-H24-E3-K2-I20-one-packed-float32",
    "T25-H24-E4-K2-I20-nobody-separate-float32",
    "T25-H24-E4-K1-I20-nobody-packed-float32",
    "T20-H32-E4-K2-I16-uneven-packed-strided-float32",
    "T12-H40-E3-K2-I24-uneven-packed-float16",
    "a_second_time",
    "tiles_of_the_table",
    "only_what_is_needed",
    "weights_in_16_bits",
    "saved_product",
    "no_tokens",
    "rows_of_other_ranks",
    "gathered_rows",
    "without_a_backward_pass",
    "sorting",
]


def lines_of(script: str, *words: str, **environment: str) -> list:
    """Run a script of this folder and read its lines of JSON."""
    if find_spec("triton") is None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            pytest.skip("Triton has no wheels for this platform")
        pytest.fail("Triton is missing: pip install -e '.[test]'")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | environment
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, HERE / script, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Errors by case, None where there is none."""
    return dict(lines_of("experts_triton_worker.py", TRITON_INTERPRET="1"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list:
    """(Name, bytes of shared memory, instructions for tensor cores, bytes spilled) of each kernel."""
    return lines_of("experts_triton_compiler.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_kernels_equal_the_formula(name, interpreted):
    assert interpreted[name] is None, interpreted[name]


def test_all_cases_are_looked_at(interpreted):
    assert sorted(interpreted) == sorted(NAMES)


def test_all_kernels_compile_for_hopper(compiled):
    source = "".join(path.read_text() for path in KERNELS)
    kernels = set(re.findall(r"^@triton\.jit.*\ndef (_\w+)", source, re.MULTILINE))
    assert {name for name, *_ in compiled} == kernels and kernels > PRODUCTS


def test_products_in_16_bits_are_pipelined_through_tensor_cores(compiled):
    """The operands of all three stages, (64 + 64) × 32 values each, wait in shared memory."""
    for name, shared, tensor_cores, _ in compiled:
        if name in PRODUCTS:
            assert tensor_cores >= 2 and shared >= 3 * (64 + 64) * 32 * 2, (name, shared, tensor_cores)


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_expert", [16, 1024])
@pytest.mark.parametrize("case", BENCHMARKED, ids=lambda case: case.name)
def test_tiles_of_the_table_fit_into_a_hopper_gpu(case, rows_per_expert, tmp_path):
    """Shared memory holds the stages, registers the sums: a program that spills them waits for memory."""
    tokens = rows_per_expert * case.num_experts // case.top_k
    sizes = [str(size) for size in (tokens, case.hidden_size, case.num_experts, case.top_k, case.width)]
    compiled = lines_of("experts_triton_compiler.py", *sizes, TRITON_CACHE_DIR=str(tmp_path))
    assert {name for name, *_ in compiled} > PRODUCTS
    for name, shared, _, spilled in compiled:
        assert shared <= HOPPER and spilled == 0, (name, shared, spilled)


def test_triton_is_imported_for_cuda_only():
    """A machine without Triton can import the package: only its kernels import Triton, only functions import these."""
    others = [path for path in (ROOT / "moe_hf").rglob("*.py") if path not in KERNELS]
    for path in others:
        for node in ast.parse(path.read_text()).body:
            words = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
            assert "triton" not in words, f"{path.name}: {words}"
