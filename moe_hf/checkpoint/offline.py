"""Open a training checkpoint as a model, from the disk alone: one process, no accelerator, no process group."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .export_files import CARD_NAME
from .manifest import EXPORT_NAME, checkpoints_of, fingerprints, read_manifest, resumed_part, verify
from .sharded import ShardedCheckpoint
from .source import SIDE_FILES, MoESource, open_model


def open_exportable(path: Path, on_file: Callable[[str], None] | None = None) -> MoESource:
    """Open a training checkpoint, of which every file is verified first, or a folder with a model.

    The weights of a checkpoint are the float32 masters; its dtype is that of training.

    Args:
        path: `checkpoint-N`, or a folder with `config.json`.
        on_file: called with the name of each file of a checkpoint that was verified.

    Raises:
        CheckpointError: it is neither, or it is torn.
    """
    if (path / "config.json").is_file():
        return open_model(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {path}; give a checkpoint-N folder or one with a model.")
    if checkpoints := checkpoints_of(path):
        raise CheckpointError(f"{path} is a run; give one of its checkpoints, such as {checkpoints[0]}.")
    if resumed_part(read_manifest(path)) == "all":
        verify(path, part="all", on_file=on_file)
        return open_model(path / EXPORT_NAME)
    manifest = verify(path, part="state", on_file=on_file)
    if manifest.topology.pipeline_parallel_size > 1:
        raise CheckpointError(
            f"{path} was written by {manifest.topology.describe()}, and shards of a pipeline are not put together; its "
            f"export in the dtype of training is {path / EXPORT_NAME}."
        )
    _verify_side_files(path)
    checkpoint = ShardedCheckpoint(path)
    dtype = getattr(torch, manifest.topology.dtype)
    return MoESource(checkpoint.config, dtype, checkpoint.read, path / EXPORT_NAME, MoEConfig.model_type)


def _verify_side_files(checkpoint: Path) -> None:
    """Of the export beside the shards only the small files are used, so only these must be what was saved."""
    recorded = read_manifest(checkpoint).files
    names = [f"{EXPORT_NAME}/{name}" for name in ("config.json", CARD_NAME, *SIDE_FILES)]
    names = [name for name in names if name in recorded]
    for name, found in fingerprints(checkpoint, names).items():
        if found != recorded[name]:
            raise CheckpointError(f"{checkpoint} is torn: {name} is not what was saved, its SHA-256 differs.")
