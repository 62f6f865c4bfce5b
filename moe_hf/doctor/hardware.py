"""What there is to compute with, and what connects it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from itertools import permutations
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from ..parallel.op_compiler import accelerator_name
from .findings import ADVICE, OK, WRONG, Finding

_LIMIT_SECONDS = 20


def num_accelerators() -> int:
    """Return how many accelerators torch sees on this machine."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def num_cores() -> int:
    """Return how many cores this process may use, which in a job is not the machine's number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_accelerator(num_ranks: int | None, *, bf16: bool = False) -> list[Finding]:
    """Judge the devices: number, memory, what they compute in, and whether torch and DeepSpeed see the same.

    Args:
        num_ranks: processes of the run, of all machines; `None` where no run was named.
        bf16: whether the run trains in BF16.
    """
    count = num_accelerators()
    if count == 0:
        return [_without(num_ranks), _cores(), _of_deepspeed("cpu")]
    kind = torch.accelerator.current_accelerator().type
    findings = [_number(count, num_ranks), _of_deepspeed(kind)]
    if kind == "cuda":
        findings += _cuda_devices(count, bf16)
    return findings


def _without(num_ranks: int | None) -> Finding:
    name = "accelerator"
    if has_nvidia_driver():
        remedy = "install torch for CUDA, with a version that the driver supports (nvidia-smi shows it)"
        found = f"there is a GPU, but torch {torch.__version__} cannot use it"
        return Finding("accelerator", name, WRONG, found, remedy)
    wanted = "" if num_ranks is None else f"; {num_ranks} processes would share its cores"
    return Finding("accelerator", name, OK, f"none: this machine trains on its CPU{wanted}")


def has_nvidia_driver() -> bool:
    """Return whether the machine has an NVIDIA GPU with a driver, unless it is hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _cores() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{num_cores()} cores, {memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB of memory are free"
    return Finding("accelerator", "CPU", OK, found)


def _number(count: int, num_ranks: int | None) -> Finding:
    found = f"{count} here"
    if num_ranks is not None and num_ranks > count:
        return Finding("accelerator", "number", OK, f"{found}; the run's {num_ranks} are on several machines")
    return Finding("accelerator", "number", OK, found)


def _of_deepspeed(kind: str) -> Finding:
    """Compare what DeepSpeed has chosen, by `DS_ACCELERATOR` or by what it finds, with what torch sees."""
    chosen = accelerator_name()
    if chosen == kind:
        return Finding("accelerator", "DeepSpeed", OK, f"computes on {chosen}")
    remedy = "unset DS_ACCELERATOR" if "DS_ACCELERATOR" in os.environ else f"set DS_ACCELERATOR={kind}"
    return Finding("accelerator", "DeepSpeed", WRONG, f"computes on {chosen}, torch on {kind}", remedy)


def _cuda_devices(count: int, bf16: bool) -> list[Finding]:
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    kinds = sorted({f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices})
    capabilities = sorted({(device.major, device.minor) for device in devices})
    listed = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    found = f"{' and '.join(kinds)}, compute capability {listed}"
    remedy = "ranks wait for the slowest; use devices of one kind" if len(kinds) > 1 else ""
    findings = [Finding("accelerator", "devices", ADVICE if remedy else OK, found, remedy)]
    if capabilities[0] >= (8, 0):  # Ampere, the first with BF16
        return [*findings, Finding("accelerator", "BF16", OK, "supported")]
    status = WRONG if bf16 else OK
    remedy = "train with --fp16 instead of --bf16" if bf16 else ""
    return [*findings, Finding("accelerator", "BF16", status, "not supported below compute capability 8.0", remedy)]


def check_interconnect() -> list[Finding]:
    """Judge what connects the processes, as far as it shows without starting any."""
    if accelerator_name() == "cuda" and (count := num_accelerators()):
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return [Finding("interconnect", "NCCL", OK, version), *_between_gpus(count)]
    if not dist.is_gloo_available():
        remedy = "install torch from pip or conda"
        return [Finding("interconnect", "gloo", WRONG, "not part of this torch", remedy)]
    return [Finding("interconnect", "gloo", OK, "part of torch"), _host_name()]


def _host_name() -> Finding:
    """Gloo binds to the address that the machine's own name stands for, and hangs when there is none."""
    name = socket.gethostname()
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return Finding("interconnect", "address", OK, f"interface {os.environ['GLOO_SOCKET_IFNAME']}")
    try:
        return Finding("interconnect", "address", OK, f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        remedy = "add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface such as lo or eth0"
        return Finding("interconnect", "address", ADVICE, f"the name {name} stands for no address: {error}", remedy)


def _between_gpus(count: int) -> list[Finding]:
    if count == 1:
        return []
    pairs = [(a, b) for a, b in permutations(range(count), 2) if not torch.cuda.can_device_access_peer(a, b)]
    links = num_nvlinks()
    speed = f"NVLink ({links} pairs of GPUs)" if links else "no NVLink: all-to-all of experts goes over PCIe"
    if pairs:
        found = f"{len(pairs)} of {count * (count - 1)} directions have no peer-to-peer access, such as {pairs[0]}"
        remedy = "expect slow expert parallelism; look at `nvidia-smi topo -m`, and at ACS or IOMMU in the BIOS"
        return [Finding("interconnect", "peer to peer", ADVICE, f"{found}; {speed}", remedy)]
    return [Finding("interconnect", "peer to peer", OK, f"between all {count} GPUs; {speed}")]


def num_nvlinks() -> int:
    """Return how many pairs of GPUs are connected by NVLink, as `nvidia-smi topo -m` tells; 0 when it does not."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"\bNV\d+\b", done.stdout.split("Legend")[0])) // 2
