"""Start the processes of the self-test through DeepSpeed's launcher, follow them, and end them when they hang."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..parallel.shared_memory import remove_shared_buffers
from .hardware import num_cores
from .phases import Phase, describe_stall, read_phases
from .worker import ERRORS, PHASES

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_LOG_NAME = "launch.log"
_LAST_LINES = 15


@dataclass(frozen=True)
class Ended:
    """How a launch has ended."""

    return_code: int
    seconds: float
    phase: str
    """What the process that was behind did last."""
    error: str
    """What went wrong, and where; empty where nothing did."""
    last_lines: list[str]
    """Of what was printed."""


def launch(plan: Path, num_ranks: int, *, on_cpu: bool, patience: float, say: Callable[[str], None]) -> Ended:
    """Run a plan in `num_ranks` processes of this machine, as the scripts start a training run.

    Args:
        plan: for `worker`; what the processes write goes to its folder.
        num_ranks: processes.
        on_cpu: whether accelerators are hidden from them.
        patience: seconds without any progress after which they are ended.
        say: told what the processes do, whenever that changes.
    """
    port, start = _free_port(), time.monotonic()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    # A file that is not there: what some clusters have at DeepSpeed's default place names other machines.
    command += ["--hostfile", plan.parent / "hostfile", "--num_accelerators", num_ranks, "--master_port", port]
    command += ["--module", "moe_hf.doctor.worker", plan]
    with (plan.parent / _LOG_NAME).open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=_environment(num_ranks, on_cpu),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            stall = _follow(process, plan.parent / PHASES, num_ranks, patience, say)
        finally:
            _end(process)
            remove_shared_buffers("127.0.0.1", port)
    phases = read_phases(plan.parent / PHASES)
    behind = min(phases.values(), key=lambda phase: phase.number, default=Phase(0, 0, "starting", 0))
    lines = (plan.parent / _LOG_NAME).read_text(errors="replace").splitlines()
    error, phase = _what_went_wrong(plan.parent / ERRORS, process.returncode, stall, behind.name)
    return Ended(process.returncode, time.monotonic() - start, phase, error, lines[-_LAST_LINES:])


def _environment(num_ranks: int, on_cpu: bool) -> dict[str, str]:
    added = {
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
    if on_cpu:
        added |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # More threads than cores only get into each other's way.
        added["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // num_ranks))
    return os.environ | added


def _follow(process, folder: Path, num_ranks: int, patience: float, say: Callable[[str], None]) -> str:
    """Wait for the end; return what hangs if nothing moves for too long, otherwise nothing."""
    seen, since = None, time.monotonic()
    while process.poll() is None:
        phases = read_phases(folder) if folder.is_dir() else {}
        if phases != seen:
            seen, since = phases, time.monotonic()
            say(_progress(phases, num_ranks))
        elif time.monotonic() - since > patience:
            return describe_stall(folder, num_ranks)
        time.sleep(_POLL_SECONDS)
    return ""


def _progress(phases: dict[int, Phase], num_ranks: int) -> str:
    if len(phases) < num_ranks:
        return f"starting {num_ranks} processes"
    return min(phases.values(), key=lambda phase: phase.number).name


def _end(process: subprocess.Popen) -> None:
    """End the launcher and all that it has started; a process in a collective call hears nothing but SIGKILL."""
    for number, seconds in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)


def _what_went_wrong(folder: Path, return_code: int, stall: str, phase: str) -> tuple[str, str]:
    """Return a sentence, empty where all is well, and the phase that it is about."""
    if stall:
        return f"nothing moved any more: {stall}", phase
    written = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    notes = [json.loads(path.read_text()) for path in written]
    if notes:
        # A rank that was cut off by another's end comes later, and knows less than that other one.
        note = min(notes, key=lambda note: note["type"] in ("RuntimeError", "DistBackendError"))
        return f"rank {note['rank']} in {note['phase']!r}: {note['type']}: {note['message'][:300]}", note["phase"]
    if return_code:
        return f"the processes ended with exit code {return_code} in {phase!r}", phase
    return "", phase


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
