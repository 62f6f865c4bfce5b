"""Whether DeepSpeed's operators, which are compiled when a run starts, can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

from ..parallel.op_compiler import accelerator_name, cannot_compile, cuda_toolkit_problem, needed_ops
from .findings import ADVICE, OK, WRONG, Finding

_AREA = "compiler"
_LIMIT_SECONDS = 60
# What every extension of torch begins with.
_SOURCE = "#include <Python.h>\n#include <vector>\nint size(const std::vector<int>& v) { return Py_GE + v.size(); }\n"


def check_compiler(deepspeed_json: dict | None) -> list[Finding]:
    """Compile a few lines of C++, look for ninja, and ask DeepSpeed about the operators that the run needs.

    Args:
        deepspeed_json: of the run, if there is one.
    """
    ops = needed_ops(deepspeed_json)
    # A run that compiles nothing does not need any of it.
    status = WRONG if ops else ADVICE
    findings = [_compile(status), _ninja(status)]
    if accelerator_name() == "cuda":
        findings.append(_cuda_toolkit())
    for op in ops:
        reason = cannot_compile(op)
        name = op.removesuffix("Builder")
        remedy = "" if reason is None else "install what it names, or choose settings that do not need it"
        findings.append(Finding(_AREA, name, OK if reason is None else WRONG, reason or "can be compiled", remedy))
    return findings


def _compile(status: str) -> Finding:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        remedy = "install one (apt-get install g++, module load gcc, …) or name it with CXX=…"
        return Finding(_AREA, "C++", status, f"there is no {compiler}", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text(_SOURCE)
        include = sysconfig.get_path("include")
        command = [*compiler.split(), "-std=c++17", "-fPIC", f"-I{include}", "-c", source, "-o", f"{source}.o"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding(_AREA, "C++", status, f"{compiler} does not work: {error}", "name another with CXX=…")
    if done.returncode != 0:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
        remedy = "install Python's headers (python3-dev)" if "Python.h" in said else "name another compiler with CXX=…"
        return Finding(_AREA, "C++", status, f"{compiler} cannot compile an extension: {said.strip()}", remedy)
    return Finding(_AREA, "C++", OK, _first_line(compiler))


def _first_line(compiler: str) -> str:
    done = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), compiler)


def _ninja(status: str) -> Finding:
    if cpp_extension.is_ninja_available():
        return Finding(_AREA, "ninja", OK, shutil.which("ninja") or "found")
    return Finding(_AREA, "ninja", status, "not on the PATH", "pip install ninja, and activate the environment")


def _cuda_toolkit() -> Finding:
    problem = cuda_toolkit_problem()
    if problem is None:
        return Finding(_AREA, "CUDA toolkit", OK, f"{cpp_extension.CUDA_HOME}, fits torch")
    remedy = "needed for operators that are compiled for GPUs only; set CUDA_HOME to a toolkit of torch's version"
    return Finding(_AREA, "CUDA toolkit", ADVICE, problem, remedy)
