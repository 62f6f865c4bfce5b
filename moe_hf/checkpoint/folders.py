"""Folders that are whole or not there: written under a temporary name, synced to disk, renamed last."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError


@contextmanager
def new_folder(destination: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends well, and is deleted when it does not.

    Args:
        destination: its final name.
        replace: put it in the place of a folder that is there.

    Raises:
        ConfigError: `destination` exists and is not an empty folder.
    """
    destination = Path(destination)
    if not replace and destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConfigError(f"--output {destination} is already there; give a new folder.")
    temporary = incomplete_name(destination)
    make_empty(temporary)
    try:
        yield temporary
        put_in_place(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def incomplete_name(destination: Path) -> Path:
    """Return the hidden name beside `destination` under which it is written."""
    return destination.with_name(f".{destination.name}.incomplete")


def make_empty(folder: Path) -> None:
    """Create `folder`, without what a killed writer may have left in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def put_in_place(temporary: Path, destination: Path) -> None:
    """Sync `temporary` to disk and rename it; a folder that is there is moved aside first and deleted last."""
    sync_to_disk(temporary)
    aside = destination.with_name(f".{destination.name}.replaced")
    if destination.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(destination, aside)
    os.replace(temporary, destination)
    _sync(destination.parent)
    if aside.exists():
        shutil.rmtree(aside)


def sync_to_disk(folder: Path) -> None:
    """Wait until everything in `folder` is on the disk, so that no later rename can come before it."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
