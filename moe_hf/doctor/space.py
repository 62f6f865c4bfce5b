"""Whether there is room for what a run writes: checkpoints, exports, the caches, shared memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tqdm import tqdm

from ..configuration_moe import MoEConfig
from ..data.corpus import default_cache_dir
from .findings import ADVICE, OK, WRONG, Finding

_AREA = "space"
# DeepSpeed's buffer of one CPU rank (csrc/cpu/comm/shm.cpp), measured.
_CPU_BUFFER_BYTES = 69_000_000
# Docker's default of 64 MB is what NCCL runs out of; its documentation asks for --shm-size=1g or more.
_NCCL_BYTES = 2**30
_CACHE_BYTES = 200_000_000
_SHARED_MEMORY = Path("/dev/shm")


def num_parameters(config: MoEConfig) -> int:
    """Return the parameters of a model, tied embeddings once."""
    from ..checkpoint.export import expected_tensors

    return sum(tensor.numel() for tensor in expected_tensors(config).values())


def export_bytes(parameters: int, *, in_16_bits: bool) -> int:
    """Return the size of an export: the weights in the training dtype."""
    return (2 if in_16_bits else 4) * parameters


def checkpoint_bytes(parameters: int, *, in_16_bits: bool, zero_stage: int) -> int:
    """Return the size of a checkpoint, of all ranks together.

    It holds float32 weights and two moments of Adam (12 bytes a parameter; Rajbhandari et al. 2020, arXiv 1910.02054,
    section 3.1), the export, and below ZeRO 3 the module's weights once more.
    """
    weights = export_bytes(parameters, in_16_bits=in_16_bits)
    return 12 * parameters + weights * (2 if zero_stage < 3 else 1)


def check_output(folder: str | os.PathLike, config: MoEConfig, *, in_16_bits: bool, stage: int, kept: int) -> Finding:
    """Compare the free space of the output folder's disk with what the run writes there.

    Args:
        folder: `--output_dir`, which need not exist yet.
        config: of the model.
        in_16_bits: whether it trains in BF16 or FP16.
        stage: of ZeRO.
        kept: checkpoints that are there at the same time, one that is being written besides; 0 if none is saved.
    """
    parameters = num_parameters(config)
    one = checkpoint_bytes(parameters, in_16_bits=in_16_bits, zero_stage=stage)
    needed = kept * one + export_bytes(parameters, in_16_bits=in_16_bits)
    parent = _existing(Path(folder))
    free = shutil.disk_usage(parent).free
    checkpoints = {0: "", 1: f"a checkpoint of {_size(one)} and "}.get(kept, f"{kept} checkpoints of {_size(one)} and ")
    found = f"{_size(free)} free at {parent}; {checkpoints}the export take {_size(needed)}"
    if not os.access(parent, os.W_OK):
        return Finding(_AREA, "output", WRONG, f"{parent} cannot be written", "give another --output_dir")
    if free < needed:
        remedy = "give an --output_dir on a larger disk, or keep fewer checkpoints with --save_total_limit"
        return Finding(_AREA, "output", WRONG, found, remedy)
    return Finding(_AREA, "output", OK, found)


def check_cache() -> Finding:
    """Judge the folder that keeps tokenizers, prepared data and downloads."""
    folder = Path(os.environ.get("HF_HOME") or default_cache_dir())
    parent = _existing(folder)
    free = shutil.disk_usage(parent).free
    if not os.access(parent, os.W_OK):
        return Finding(_AREA, "cache", WRONG, f"{parent} cannot be written", "set HF_HOME to a folder of yours")
    if free < _CACHE_BYTES:
        return Finding(_AREA, "cache", WRONG, f"{_size(free)} free at {parent}", "set HF_HOME to a larger disk")
    return Finding(_AREA, "cache", OK, f"{_size(free)} free at {parent}")


def check_shared_memory(num_ranks: int, *, on_cpu: bool) -> Finding:
    """Judge the shared memory, through which the processes of one machine speak with each other.

    Args:
        num_ranks: processes on this machine.
        on_cpu: whether they compute without accelerators.
    """
    if not _SHARED_MEMORY.is_dir():
        return Finding(_AREA, "shared memory", OK, f"this system has no {_SHARED_MEMORY}")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    needed = num_ranks * _CPU_BUFFER_BYTES if on_cpu else _NCCL_BYTES
    found = f"{_size(free)} free in {_SHARED_MEMORY}, {num_ranks} processes take up to {_size(needed)}"
    if free >= needed:
        return Finding(_AREA, "shared memory", OK, found)
    remedy = f"remove what killed processes have left there, or start the container with --shm-size={_size(needed)}"
    return Finding(_AREA, "shared memory", WRONG if on_cpu else ADVICE, found, remedy)


def _existing(path: Path) -> Path:
    """Return the path itself or its nearest parent that is there."""
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
