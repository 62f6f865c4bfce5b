"""Which of DeepSpeed's own operators a run compiles at its start, and whether they can be compiled here."""

from __future__ import annotations

import contextlib
import io

import torch

from .deepspeed_config import Config, get_section, lookup


def accelerator_name() -> str:
    """Return what DeepSpeed computes on: `cuda`, `cpu`, …"""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()._name


def needed_ops(config: Config | None) -> list[str]:
    """Return the names of the operators that DeepSpeed compiles for a run with this JSON, on this machine.

    Args:
        config: the DeepSpeed JSON; without one, what every run here compiles.
    """
    # Ranks of a CPU exchange small tensors through shared memory.
    ops = ["ShareMemCommBuilder"] if accelerator_name() == "cpu" else []
    zero = get_section(config or {}, "zero_optimization")
    devices = [lookup(zero, f"{name}.device", "none") for name in ("offload_optimizer", "offload_param")]
    if "nvme" in devices:
        ops.append("AsyncIOBuilder")
    forced = (config or {}).get("zero_force_ds_cpu_optimizer", True)
    if devices[0] != "none" and (forced or "optimizer" in (config or {})):
        ops.append("CPUAdamBuilder")
    return ops


def cannot_compile(op: str) -> str | None:
    """Return why one of DeepSpeed's operators cannot be compiled here, or `None`.

    What DeepSpeed itself looks at before it compiles: libraries, headers, and the version of the CUDA toolkit.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(op)
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":
        return f"DeepSpeed has no {op} for {accelerator_name()}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            compatible = builder.is_compatible(verbose=True)
    except Exception as error:
        return " ".join(str(error).split())
    return None if compatible else " ".join(said.getvalue().split()) or f"DeepSpeed cannot compile {builder.name} here"


def cuda_toolkit_problem() -> str | None:
    """Return why CUDA operators cannot be compiled against this torch, or `None`; without a GPU none are."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    from deepspeed.ops.op_builder.builder import assert_no_cuda_mismatch

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert_no_cuda_mismatch()
    except Exception as error:
        return " ".join(str(error).split())
    return None
