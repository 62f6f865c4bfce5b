"""The manifest of a checkpoint: what it is, and the size and SHA-256 of every file in it.

It is written last, into a folder that is renamed when whole, so that a `checkpoint-N` with a manifest was whole once;
whether it still is, the manifest tells.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .topology import Topology, architecture_of

MANIFEST_NAME = "manifest.json"
EXPORT_NAME = "hf"
_FORMAT = 1
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps made.
        samples_seen: place in the data, in rows over all ranks: whole epochs times the rows of one, plus the rows of
            the epoch begun. Rows that fill up the last batch of an epoch do not count, rows it drops do.
        global_batch_size: rows of one optimizer step, over all ranks and accumulated micro-batches.
        skipped_steps: of these steps, how many were skipped because something was NaN or infinite.
        skipped_in_a_row: how many of them were the last.
    """

    step: int
    samples_seen: int = 0
    global_batch_size: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class FileRecord:
    """What one file has to be: its size in bytes, and its SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record of one checkpoint.

    Attributes:
        topology: layout of the run that wrote it.
        architecture: fields of the model's configuration that tensors and their meaning depend on.
        progress: how far the run had come.
        files: every file but the manifest, by its path within the checkpoint, with `/` between folders.
        saved_at: seconds since 1970, by the clock of rank 0.
        weights_only: written with `--save_only_model`: nothing resumes from it.
    """

    topology: Topology
    architecture: dict
    progress: Progress
    files: dict[str, FileRecord]
    saved_at: float
    weights_only: bool = False


def write_manifest(
    checkpoint: Path,
    topology: Topology,
    config: MoEConfig,
    progress: Progress,
    *,
    files: dict[str, FileRecord] | None = None,
    weights_only: bool = False,
    not_before: float = 0.0,
) -> None:
    """Write the manifest of a folder that is otherwise complete, and wait until it is on the disk.

    Args:
        checkpoint: the folder.
        topology: of this run.
        config: of its model.
        progress: how far it has come.
        files: what `fingerprints` returns for the files of the folder; they are read now when it is not given.
        weights_only: nothing can resume from it.
        not_before: the earliest time that it may say it was written at, whatever the clock says.
    """
    if files is None:
        files = fingerprints(checkpoint, file_names(checkpoint))
    manifest = Manifest(topology, architecture_of(config), progress, files, max(time.time(), not_before), weights_only)
    temporary = checkpoint / f".{MANIFEST_NAME}"
    with open(temporary, "wb") as file:
        file.write(_render(asdict(manifest)).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MANIFEST_NAME)


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a `checkpoint-N` folder.

    Raises:
        CheckpointError: there is none, or one byte of it is not what was written.
    """
    path = Path(checkpoint) / MANIFEST_NAME
    try:
        text = path.read_bytes().decode()
        record = json.loads(text)
        if record.pop("format") != _FORMAT:
            raise CheckpointError(f"{path} is of another version of moe_hf; resume with the one that wrote it.")
        del record["sha256"]
        if text != _render(record):
            raise ValueError("changed")
        record["topology"] = Topology(**record["topology"])
        record["progress"] = Progress(**record["progress"])
        record["files"] = {name: FileRecord(**file) for name, file in record["files"].items()}
        return Manifest(**record)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST_NAME}, so it is not a whole checkpoint of run_clm_moe.py."
        ) from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{checkpoint} is torn: {MANIFEST_NAME} is damaged.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def verify(
    checkpoint: Path,
    *,
    checksums: bool = True,
    part: str = "all",
    share: tuple[int, int] = (0, 1),
    on_file: Callable[[str], None] | None = None,
) -> Manifest:
    """Raise `CheckpointError`, naming a file, unless the checkpoint is what was saved; return its manifest.

    Args:
        checkpoint: a `checkpoint-N` folder.
        checksums: read every file; otherwise only sizes are compared.
        part: `"all"` files, the `"export"` in `hf/`, or the `"state"`, which is everything else.
        share: (i, n) reads the i-th of n parts of the files, for n processes that verify together.
        on_file: called with the name of each file that was read and found well.
    """
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    files = {name: record for name, record in manifest.files.items() if part in ("all", _part_of(name))}
    for name, record in files.items():
        _check_size(checkpoint, name, record.size)
    if checksums:
        index, count = share
        for name, found in _each_fingerprint(checkpoint, list(files)[index::count]):
            if found != files[name]:
                raise CheckpointError(f"{checkpoint} is torn: {name} is not what was saved, its SHA-256 differs.")
            if on_file is not None:
                on_file(name)
    return manifest


def is_whole(checkpoint: Path, *, checksums: bool = True, part: str | None = None) -> bool:
    """Return whether a `checkpoint-N` folder is what was saved.

    Args:
        checkpoint: the folder.
        checksums: read every file; otherwise only sizes are compared.
        part: as in `verify`; by default what a run resumes from.
    """
    try:
        verify(checkpoint, checksums=checksums, part=part or resumed_part(read_manifest(checkpoint)))
    except CheckpointError:
        return False
    return True


def resumed_part(manifest: Manifest) -> str:
    """Return which part of a checkpoint a run resumes from: with DeepSpeed not the export in `hf/`."""
    return "state" if manifest.topology.has_deepspeed and not manifest.weights_only else "all"


def newest_whole(output_dir: Path, *, checksums: bool = True) -> Path | None:
    """Return the whole checkpoint of a run that was written last and can be resumed from, or `None`."""
    for checkpoint in checkpoints_of(output_dir):
        if is_whole(checkpoint, checksums=checksums) and not read_manifest(checkpoint).weights_only:
            return checkpoint
    return None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run, the one that was written last first, whole or not.

    A run that was set back writes smaller numbers later. Folders without a readable manifest come last.
    """

    def age(path: Path) -> tuple[float, int]:
        step = int(path.name.removeprefix("checkpoint-"))
        try:
            return -read_manifest(path).saved_at, -step
        except CheckpointError:
            return 0.0, -step

    folders = (path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    return sorted((path for path in folders if path.name.removeprefix("checkpoint-").isdecimal()), key=age)


def last_saved_at(output_dir: Path) -> float:
    """Return the latest time at which a checkpoint of a run says it was written, 0 if there is none."""
    times = [0.0]
    for checkpoint in checkpoints_of(output_dir):
        with contextlib.suppress(CheckpointError):
            times.append(read_manifest(checkpoint).saved_at)
    return max(times)


def file_names(checkpoint: Path) -> list[str]:
    """Return the names that a manifest of the folder has to list, sorted."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST_NAME, f".{MANIFEST_NAME}"))


def fingerprints(checkpoint: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Return size and SHA-256 of the named files of a folder."""
    return dict(_each_fingerprint(checkpoint, names))


def _part_of(name: str) -> str:
    return "export" if name.startswith(f"{EXPORT_NAME}/") else "state"


def _each_fingerprint(checkpoint: Path, names: Iterable[str]) -> Iterator[tuple[str, FileRecord]]:
    # Threads, because hashing lets others run.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        pending = [(name, pool.submit(_fingerprint, checkpoint, name)) for name in names]
        try:
            for name, future in pending:
                yield name, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _fingerprint(checkpoint: Path, name: str) -> FileRecord:
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK_BYTES))
    try:
        with open(checkpoint / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        raise CheckpointError(f"{checkpoint} is torn: {name} cannot be read: {error.strerror}.") from None
    return FileRecord(size, digest.hexdigest())


def _check_size(checkpoint: Path, name: str, size: int) -> None:
    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is torn: {name} is missing.")
    if (found := path.stat().st_size) != size:
        raise CheckpointError(f"{checkpoint} is torn: {name} has {found} bytes instead of {size}.")


def _render(record: dict) -> str:
    """Return the one text of a manifest: every byte of it is fixed by what it says, and by the SHA-256 of that."""
    content = {"format": _FORMAT, **record}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"
