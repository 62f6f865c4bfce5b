"""The machine and what else runs on it: settings that are the same for all, and whether times mean anything."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from moe_hf import __version__
from moe_hf.errors import ConfigError

# One thread, and an allocator that keeps what it got: fetching pages anew from the system costs some peers a half.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    # Huge pages: else models differ by up to 30,000 page faults a step, some per cent, by where their heap came to lie.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CUDA_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

_PACKAGES = ("torch", "transformers", "deepspeed", "triton", "liger-kernel", "sonic-moe", "scattermoe", "megablocks")


def resolve_device(device: str) -> str:
    """Return `"cuda"` or `"cpu"` for `"auto"` and the two.

    Raises:
        ConfigError: there is no GPU where one is asked for.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda but torch sees no GPU here; use --device cpu.")
    return device


def environment_of(device: str) -> dict[str, str]:
    """Return the environment variables under which everything on a device is measured."""
    return CUDA_ENVIRONMENT if device == "cuda" else CPU_ENVIRONMENT


def restart_with(environment: dict[str, str], argv: list[str]) -> None:
    """Start this program again where its environment is another one: allocators read it before anything else runs."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *argv], {**os.environ, **environment})


def describe_machine(device: str) -> dict:
    """Return what a reader needs to know of the machine to judge the times."""
    described = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": torch.get_num_threads(),
        "environment": environment_of(device),
        "load_average": [round(value, 2) for value in psutil.getloadavg()],
    }
    if device == "cuda":
        described["gpu_memory_gb"] = round(torch.cuda.mem_get_info()[1] / 1e9, 1)
    return described


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of what is measured, of those that are installed, and the commit of this repository."""
    found = {"python": platform.python_version(), "moe_hf": __version__, "commit": _commit()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Return the commit that is checked out, with a `+` where files that it knows are changed."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
