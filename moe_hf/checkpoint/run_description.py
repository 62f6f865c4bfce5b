"""What is in a training checkpoint, and in the output folder of a run, told from manifests; no pickle is executed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .description import ModelDescription, ModelSize, describe_model, size_of
from .manifest import EXPORT_NAME, MANIFEST_NAME, Manifest, checkpoints_of, file_names, read_manifest, verify
from .sharded import ShardedCheckpoint


@dataclass
class CheckpointDescription:
    """What a `checkpoint-N` folder holds.

    Attributes:
        path: the folder.
        manifest: its record, `None` where there is none that can be read.
        size: of its model.
        files: sizes in bytes of what is there, by path within the folder.
        checksums: whether every file was read and compared with its checksum.
        shapes: of the whole tensors that the sharded state holds, by their Hugging Face names, where asked for.
        states: `"fp32"` and the optimizer's states, of which each of these tensors has one.
        export: what is in `hf`, `None` where there is none.
        state_problems: what keeps a run from resuming here; none is as good as new.
        export_problems: what is wrong with `hf`.
    """

    kind: ClassVar[str] = "checkpoint"

    path: Path
    manifest: Manifest | None = None
    size: ModelSize | None = None
    files: dict[str, int] = field(default_factory=dict)
    checksums: bool = False
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    export: ModelDescription | None = None
    state_problems: list[str] = field(default_factory=list)
    export_problems: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Return all of them as sentences; without one the checkpoint is whole."""
        return [*self.state_problems, *self.export_problems]

    @property
    def resumable(self) -> bool:
        """Whether a run can resume here: with DeepSpeed a damaged export is in nobody's way."""
        if self.manifest is None or self.manifest.weights_only:
            return False
        return not (self.state_problems if self.manifest.topology.has_deepspeed else self.problems)

    def as_json(self, tensors: bool = False) -> dict:
        """Return plain values, as `moe-hf inspect --json` documents them; `tensors` adds a table of them."""
        manifest = self.manifest
        listed = {
            "tensors": {n: {"shape": list(shape)} for n, shape in self.shapes.items()},
            "tensor_states": self.states,
        }
        return {
            "kind": self.kind,
            "path": str(self.path),
            "whole": not self.problems,
            "problems": self.problems,
            "step": manifest and manifest.progress.step,
            "topology": manifest and asdict(manifest.topology),
            "progress": manifest and asdict(manifest.progress),
            "weights_only": manifest and manifest.weights_only,
            "resumable": self.resumable,
            "size": self.size and asdict(self.size),
            "files": self.files,
            "bytes": sum(self.files.values()),
            "checksums_verified": self.checksums and not self.problems,
            "export": self.export and self.export.as_json(),
        } | (listed if tensors else {})


@dataclass
class RunDescription:
    """What an output folder holds.

    Attributes:
        path: the folder.
        checkpoints: the one that was written last first.
        export: the final one in `hf`, `None` where there is none.
        leftovers: names of folders that a run which was killed had not finished.
        export_problems: what is wrong with `hf`.
    """

    kind: ClassVar[str] = "run"

    path: Path
    checkpoints: list[CheckpointDescription] = field(default_factory=list)
    export: ModelDescription | None = None
    leftovers: list[str] = field(default_factory=list)
    export_problems: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Return those of the checkpoints and of the export."""
        return [problem for checkpoint in self.checkpoints for problem in checkpoint.problems] + self.export_problems

    @property
    def newest_resumable(self) -> CheckpointDescription | None:
        """Return the checkpoint that `--resume_from_checkpoint auto` would take, or `None`."""
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.resumable), None)

    def as_json(self, tensors: bool = False) -> dict:
        """Return plain values, as `moe-hf inspect --json` documents them; `tensors` adds a table to each checkpoint."""
        newest = self.newest_resumable
        return {
            "kind": self.kind,
            "path": str(self.path),
            "whole": not self.problems,
            "problems": self.problems,
            "checkpoints": [checkpoint.as_json(tensors) for checkpoint in self.checkpoints],
            "newest_resumable": newest and newest.path.name,
            "export": self.export and self.export.as_json(tensors),
            "leftovers": self.leftovers,
        }


def describe(
    path: Path, *, checksums: bool = True, tensors: bool = False, on_bytes: Callable[[int], None] | None = None
) -> ModelDescription | CheckpointDescription | RunDescription:
    """Describe a model folder, a `checkpoint-N` folder or the output folder of a run, whichever `path` is.

    Args:
        path: the folder.
        checksums: read every file of a checkpoint and compare it; otherwise only sizes are compared.
        tensors: read which tensors the sharded state of a checkpoint holds.
        on_bytes: called with the size of each file that was read for its checksum.

    Raises:
        CheckpointError: it is none of the three. What it lacks becomes `problems` instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a model, a checkpoint-N or OUTPUT_DIR of a run.")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return describe_model(path)
    if (path / MANIFEST_NAME).is_file() or (path / "latest").is_file() or path.name.startswith("checkpoint-"):
        return describe_checkpoint(path, checksums=checksums, tensors=tensors, on_bytes=on_bytes)
    if checkpoints_of(path) or (path / EXPORT_NAME).is_dir() or _leftovers(path):
        return describe_run(path, checksums=checksums, tensors=tensors, on_bytes=on_bytes)
    raise CheckpointError(
        f"{path} holds no model (config.json), no checkpoint ({MANIFEST_NAME}) and no run (checkpoint-N or hf)."
    )


def describe_checkpoint(
    path: Path, *, checksums: bool = True, tensors: bool = False, on_bytes: Callable[[int], None] | None = None
) -> CheckpointDescription:
    """Describe a `checkpoint-N` folder; the arguments are those of `describe`."""
    description = CheckpointDescription(path, files={name: (path / name).stat().st_size for name in file_names(path)})
    try:
        description.manifest = manifest = read_manifest(path)
    except CheckpointError as error:
        description.state_problems.append(str(error))
    else:
        description.size = _size(manifest)
        for part, problems in (("state", description.state_problems), ("export", description.export_problems)):
            try:
                verify(
                    path,
                    checksums=checksums,
                    part=part,
                    on_file=lambda name: on_bytes(manifest.files[name].size) if on_bytes else None,
                )
            except CheckpointError as error:
                problems.append(str(error))
        description.checksums = checksums
        is_readable = manifest.topology.has_deepspeed and manifest.topology.tensor_parallel_size == 1
        if tensors and not description.state_problems and is_readable:
            _read_shapes(description)
    description.export, problems = _describe_export(path / EXPORT_NAME)
    description.export_problems += problems
    return description


def describe_run(
    path: Path, *, checksums: bool = True, tensors: bool = False, on_bytes: Callable[[int], None] | None = None
) -> RunDescription:
    """Describe the output folder of a run; the arguments are those of `describe`."""
    description = RunDescription(path, leftovers=_leftovers(path))
    for folder in checkpoints_of(path):
        checkpoint = describe_checkpoint(folder, checksums=checksums, tensors=tensors, on_bytes=on_bytes)
        description.checkpoints.append(checkpoint)
    description.export, description.export_problems = _describe_export(path / EXPORT_NAME)
    return description


def _describe_export(folder: Path) -> tuple[ModelDescription | None, list[str]]:
    if not folder.is_dir():
        return None, []
    try:
        export = describe_model(folder)
    except CheckpointError as error:
        return None, [str(error)]
    return export, export.problems


def bytes_to_verify(path: Path) -> int:
    """Return how many bytes are read to verify the checksums of a checkpoint, or of all checkpoints of a run."""
    total = 0
    for folder in [path, *checkpoints_of(path)]:
        try:
            total += sum(record.size for record in read_manifest(folder).files.values())
        except CheckpointError:
            continue  # it has nothing to compare with
    return total


def _size(manifest: Manifest) -> ModelSize | None:
    try:
        return size_of(MoEConfig(**manifest.architecture))
    except (TypeError, ValueError):  # written by a version with other fields
        return None


def _read_shapes(description: CheckpointDescription) -> None:
    try:
        reader = ShardedCheckpoint(description.path)
        description.shapes, description.states = reader.shapes, reader.state_names
    except CheckpointError as error:
        description.state_problems.append(str(error))


def _leftovers(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.glob(".*.incomplete") if folder.is_dir())
