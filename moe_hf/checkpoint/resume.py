"""Which checkpoint a run may resume from: whole, of the same model, and of a layout that can be converted."""

from pathlib import Path

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .manifest import Manifest, checkpoints_of, is_whole, read_manifest, resumed_part, verify
from .topology import Topology, what_must_stay


def check_resumable(checkpoint: Path, topology: Topology, config: MoEConfig) -> Manifest:
    """Return the manifest of a checkpoint from which a run of this layout and model can go on.

    Sizes of files are compared, but no checksums: that takes time, and is to be shared by all processes.

    Args:
        checkpoint: a `checkpoint-N` folder.
        topology: of the run that wants to resume.
        config: its model.

    Raises:
        CheckpointError: the checkpoint is not there, torn, or of another layout or model.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"There is no checkpoint at {checkpoint}; give a checkpoint-N folder of an earlier run.")
    check_whole(checkpoint)
    manifest = read_manifest(checkpoint)
    if manifest.weights_only:
        raise CheckpointError(
            f"{checkpoint} holds weights only (--save_only_model); add --reset_optimizer to start from them."
        )
    check_architecture(checkpoint, manifest, config)
    if reason := what_must_stay(manifest.topology, topology):
        raise CheckpointError(
            f"{checkpoint} was written by {manifest.topology.describe()}, but this run has {topology.describe()}: "
            f"{reason}. To start from its weights only, add --reset_optimizer."
        )
    return manifest


def check_whole(checkpoint: Path, part: str | None = None) -> None:
    """Raise `CheckpointError`, and offer another checkpoint, unless this one has all files in their sizes.

    Args:
        checkpoint: a `checkpoint-N` folder.
        part: of the checkpoint, as in `verify`; by default what a run resumes from.
    """
    try:
        verify(checkpoint, checksums=False, part=part or resumed_part(read_manifest(checkpoint)))
    except CheckpointError as error:
        raise with_offer(error, checkpoint) from None


def check_architecture(checkpoint: Path, manifest: Manifest, config: MoEConfig) -> None:
    """Raise `CheckpointError` unless the checkpoint holds this model."""
    for name, value in manifest.architecture.items():
        if getattr(config, name, None) != value:
            raise CheckpointError(
                f"{checkpoint} holds another model: {name}={value} there but {getattr(config, name, None)} here; "
                "give the configuration it was trained with."
            )


def with_offer(error: CheckpointError, torn: Path) -> CheckpointError:
    """Add to what is wrong with a checkpoint which other one of the same run is whole, as far as sizes tell."""
    for other in checkpoints_of(torn.parent):
        if other != torn and is_whole(other, checksums=False) and not read_manifest(other).weights_only:
            return CheckpointError(f"{str(error).removesuffix('.')}; resume from {other}.")
    return without_offer(error)


def without_offer(error: CheckpointError) -> CheckpointError:
    """Add to what is wrong with a checkpoint that the run has left no other."""
    return CheckpointError(f"{str(error).removesuffix('.')}; there is no other whole checkpoint beside it.")
