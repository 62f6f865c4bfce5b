"""Convert a training checkpoint to DeepSpeed's Universal Checkpoint, from which any layout resumes.

DeepSpeed's own converter refuses ZeRO 0 and keeps the names of the layout that wrote the checkpoint: its result cannot
cross ZeRO stages 2 and 3 nor switch AutoEP on or off. This one writes the same format from whole tensors, under the
names that the resuming engine gives its parameters.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import CheckpointError
from .folders import new_folder
from .manifest import file_names, fingerprints
from .sharded import ShardedCheckpoint

TAG = "universal"
BUFFERS_NAME = "buffers.pt"
_FILES_NAME = "files.json"

# What DeepSpeed's loader reads: these and the step.
MOMENTS = ("exp_avg", "exp_avg_sq")

# The loader walks the saved optimizer groups beside the engine's and ignores those in excess. Groups without settings
# leave the engine its own; with settings, ZeRO 3 would give the first one's weight decay to all.
_OPTIMIZER_GROUPS = [{}] * 4096


def universal_folder(checkpoint: Path, expert_parallel: bool) -> Path:
    """Return where the conversion of a checkpoint is kept for engines with or without AutoEP."""
    return checkpoint / ("universal_autoep" if expert_parallel else "universal")


def write_universal(
    checkpoint: ShardedCheckpoint,
    destination: Path,
    *,
    expert_parallel: bool,
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Write `destination`, which appears when it is whole; one parameter is held at a time.

    Args:
        checkpoint: to convert.
        destination: see `universal_folder`.
        expert_parallel: write the experts as AutoEP names them, `w1`, `w2` and `w3`, which it cuts by rank.
        on_tensor: called with each parameter's name before it is read.

    Raises:
        CheckpointError: the checkpoint is damaged.
        OSError: the disk is full; torch may say so with a RuntimeError.
    """
    with new_folder(destination, replace=True) as folder:
        zero = folder / TAG / "zero"
        zero.mkdir(parents=True)
        step = torch.tensor(checkpoint.step)
        for name in checkpoint.shapes:
            if name not in checkpoint.buffers:
                if on_tensor is not None:
                    on_tensor(name)
                _write_parameter(checkpoint, name, zero, step, expert_parallel)
        _write_global_state(checkpoint, folder / TAG, step, expert_parallel)
        (folder / "latest_universal").write_text(TAG)
        records = fingerprints(folder, file_names(folder))
        (folder / _FILES_NAME).write_text(json.dumps({name: asdict(record) for name, record in records.items()}))


def is_intact(folder: Path) -> bool:
    """Return whether a conversion is there, and every file of it is as it was written."""
    try:
        recorded = json.loads((folder / _FILES_NAME).read_text())
        found = fingerprints(folder, (name for name in file_names(folder) if name != _FILES_NAME))
        return recorded == {name: asdict(record) for name, record in found.items()}
    except (OSError, ValueError, CheckpointError):
        return False


def _write_parameter(
    checkpoint: ShardedCheckpoint, name: str, zero: Path, step: torch.Tensor, expert_parallel: bool
) -> None:
    is_trained = name not in checkpoint.frozen
    for state in ("fp32", *MOMENTS) if is_trained else ("fp32",):
        tensor = checkpoint.read(name, state)
        for engine_name, part in _as_engine_names(name, tensor, expert_parallel).items():
            (zero / engine_name).mkdir(exist_ok=True)
            torch.save(_universal(engine_name, part), zero / engine_name / f"{state}.pt")
            if is_trained:
                torch.save(step, zero / engine_name / "step.pt")


def _as_engine_names(name: str, tensor: torch.Tensor, expert_parallel: bool) -> dict[str, torch.Tensor]:
    """Return what an engine with or without AutoEP calls a tensor, and its parts if it divides it."""
    if not expert_parallel:
        return {name: tensor}
    prefix = name.rpartition(".")[0]
    if name.endswith(".experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return {f"{prefix}.w1": gate.contiguous(), f"{prefix}.w3": up.contiguous()}
    if name.endswith(".experts.down_proj"):
        return {f"{prefix}.w2": tensor}
    return {name.replace(".mlp.gate.", ".mlp.router."): tensor}


def _universal(engine_name: str, tensor: torch.Tensor) -> dict:
    record = {"param": tensor.float(), "cat_dim": 0}
    if engine_name.rpartition(".")[2] in ("w1", "w2", "w3"):
        record |= {"is_expert_param": True, "ep_num_experts": tensor.shape[0]}
    return record


def _write_global_state(checkpoint: ShardedCheckpoint, folder: Path, step: torch.Tensor, expert_parallel: bool) -> None:
    optimizer_state = {
        # Read at stages 1 and 2 …
        "param_groups": _OPTIMIZER_GROUPS,
        "ds_version": "0.19.8",
        # … and at stage 3.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": _OPTIMIZER_GROUPS[:1]},
    }
    torch.save(optimizer_state, folder / "zero" / "optimizer_state.pt")
    model_state = {
        "module": {},
        "lr_scheduler": None,
        "dp_world_size": checkpoint.topology.world_size,
        "mp_world_size": 1,
        **checkpoint.counters,
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(model_state, folder / name)
    buffers = {}
    for name, tensor in checkpoint.buffers.items():
        buffers |= _as_engine_names(name, tensor, expert_parallel)
    torch.save(buffers, folder / BUFFERS_NAME)
