"""Checkpoints that are whole or not there.

A checkpoint is written to a hidden folder beside its place. When all processes have written their part, sizes and
checksums go into its manifest, everything is synced to the disk, and one rename puts it in place; only then are older
ones deleted. A process that is killed at any moment leaves the checkpoints that were there, and a hidden folder that
the next run deletes.
"""

import contextlib
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.folders import incomplete_name, make_empty, put_in_place, sync_to_disk
from ..checkpoint.manifest import (
    Progress,
    checkpoints_of,
    file_names,
    fingerprints,
    is_whole,
    last_saved_at,
    write_manifest,
)
from ..checkpoint.topology import Topology
from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError, UserError
from ..parallel.processes import raise_together, rank, world_size

# Network file systems may show only after a while what another machine has written.
_PATIENCE_SECONDS = 20.0


def begin(checkpoint: Path) -> Path:
    """Return an empty folder beside `checkpoint`, in which it is to be written under its own name (collective)."""
    staging = incomplete_name(checkpoint)

    def make() -> None:
        remove_leftovers(checkpoint.parent)
        make_empty(staging)

    _together(checkpoint, make, only_rank_0=True)
    return staging


@contextlib.contextmanager
def without_latest(engine: Any) -> Iterator[None]:
    """Keep a DeepSpeed engine from writing the file `latest` with its checkpoints."""
    engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)
    try:
        yield
    finally:
        del engine.save_checkpoint


def write_latest(written: Path) -> None:
    """Write the file `latest`, which tells DeepSpeed the name of its part, when all ranks have written theirs."""

    def write() -> None:
        tags = [path.name for path in written.glob("global_step*") if path.is_dir()]
        if tags:
            (written / "latest").write_text(tags[0])

    _together(written, write, only_rank_0=True)


def finish(
    checkpoint: Path, topology: Topology, config: MoEConfig, progress: Progress, *, weights_only: bool = False
) -> None:
    """Put in place what all processes have written to the folder that `begin` has made (a collective call).

    Args:
        checkpoint: where it goes; what is there is replaced.
        topology: of this run.
        config: of its model.
        progress: how far it has come.
        weights_only: nothing can resume from it.

    Raises:
        CheckpointError: something could not be written, or is not on a disk that all processes share.
    """
    written = incomplete_name(checkpoint) / checkpoint.name
    sizes = _together(checkpoint, lambda: {name: (written / name).stat().st_size for name in file_names(written)})
    sizes = {name: size for seen in _gather(sizes) for name, size in seen.items()}

    def read_back() -> dict:
        for name, size in sizes.items():
            _await_file(written / name, size)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sync_to_disk(written)
        return fingerprints(written, sorted(sizes)[rank() :: world_size()])

    files = {name: file for part in _gather(_together(checkpoint, read_back)) for name, file in part.items()}

    def put() -> None:
        in_order = {name: files[name] for name in sorted(files)}
        # What is written now is the newest, also after the clock was set back.
        after = last_saved_at(checkpoint.parent) + 1e-3
        write_manifest(written, topology, config, progress, files=in_order, weights_only=weights_only, not_before=after)
        put_in_place(written, checkpoint)
        shutil.rmtree(written.parent, ignore_errors=True)

    _together(checkpoint, put, only_rank_0=True)


def discard(checkpoint: Path) -> None:
    """Delete what a failed save has written: the disk may be full."""
    shutil.rmtree(incomplete_name(checkpoint), ignore_errors=True)


def could_not_write(checkpoint: Path, error: Exception) -> CheckpointError:
    """Return an error that says what could not be written, why, and how full the disk is."""
    reason = " ".join(str(error).split()).rstrip(".")
    with contextlib.suppress(OSError):
        # Torch tells the line of its own source that failed to write, but not that the disk is full.
        reason += f" ({shutil.disk_usage(checkpoint.parent).free / 2**20:,.0f} MB are free on its disk)"
    return CheckpointError(f"Could not write {checkpoint}: {reason}.")


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete all but the newest whole checkpoints; torn ones are deleted and do not count.

    Args:
        output_dir: of the run.
        limit: `--save_total_limit`; `None` keeps all.
        best: the checkpoint with the best metric, which is kept in any case, as the newest is.
    """
    if not limit or limit < 0:
        return
    checkpoints = checkpoints_of(output_dir)
    whole = [checkpoint for checkpoint in checkpoints if is_whole(checkpoint, checksums=False)]
    kept = whole[:1] + [checkpoint for checkpoint in whole[1:] if best and checkpoint == Path(best)]
    kept += [checkpoint for checkpoint in whole if checkpoint not in kept][: max(0, limit - len(kept))]
    for checkpoint in checkpoints:
        if kept and checkpoint not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Delete the hidden folders in which a killed run has begun to write checkpoints."""
    restore_replaced(output_dir)
    for name in ("incomplete", "replaced"):
        for path in output_dir.glob(f".checkpoint-*.{name}"):
            shutil.rmtree(path)


def restore_replaced(output_dir: Path) -> None:
    """Put back a checkpoint that was moved aside for a newer one of the same number, which then did not come.

    Several processes may call this at once: whichever comes first moves it, and all return when it is in place.
    """
    for aside in output_dir.glob(".checkpoint-*.replaced"):
        place = output_dir / aside.name.removeprefix(".").removesuffix(".replaced")
        if not place.exists():
            with contextlib.suppress(FileNotFoundError):
                os.rename(aside, place)


def check_shared(output_dir: Path) -> None:
    """Raise `ConfigError` unless all processes see what rank 0 writes to the output folder (a collective call).

    All processes write into one checkpoint, so that it has to lie on a disk that all machines share.
    """
    if world_size() == 1 or not dist.is_initialized():
        return
    probe = output_dir / f".seen-by-all-{_gather(uuid.uuid4().hex)[0]}"
    error = None
    try:
        if rank() == 0:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
    except OSError as cause:
        error = ConfigError(f"--output_dir {output_dir} cannot be written: {cause.strerror}.")
    raise_together(error)
    blind = [str(index) for index, seen in enumerate(_gather(_appears(probe))) if not seen]
    if rank() == 0:
        probe.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"--output_dir {output_dir} is not on a disk that all machines share: rank {', '.join(blind)} cannot see "
            "what rank 0 writes there; give a folder that all see."
        )


def _appears(path: Path, size: int = 0) -> bool:
    """Return whether a file of that size is there, or comes to be seen in time."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _await_file(path: Path, size: int) -> None:
    if not _appears(path, size):
        raise CheckpointError(
            f"Rank {rank()} cannot see {path}, which another rank has written; --output_dir must be on a disk that all "
            "machines share."
        )


def _together(checkpoint: Path, function: Callable[[], Any], *, only_rank_0: bool = False) -> Any:
    """Call `function` on all ranks, or on rank 0; if it fails on one, raise its error on all (a collective call)."""
    result, error = None, None
    try:
        if rank() == 0 or not only_rank_0:
            result = function()
    except UserError as met:
        error = met
    except OSError as met:
        error = could_not_write(checkpoint, met)
    raise_together(error)
    return result


def _gather(value: Any) -> list[Any]:
    """Return the values of all ranks (a collective call)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
