"""A folder of its own for what a process rests on NVMe, which is gone when the process is.

DeepSpeed names its swap files after the rank alone and never removes them: two runs with one `nvme_path` would write
into each other's weights without a word, and every run would leave behind as much as it had moved there.
"""

import atexit
import contextlib
import copy
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from .deepspeed_config import Config
from .offload import nvme_sections

_PREFIX = "moe_hf-"
_held: dict[Path, int] = {}


def with_own_folder(config: Config) -> Config:
    """Return a copy of a DeepSpeed JSON that keeps what is on NVMe in a new folder of this process.

    The folder is removed when the process ends, or by the next run on this machine if it was killed.

    Args:
        config: the DeepSpeed JSON; every `nvme_path` in it is a folder that can be written.
    """
    config, folders = copy.deepcopy(config), {}
    for section in nvme_sections(config).values():
        parent = Path(section["nvme_path"])
        if parent not in folders:
            remove_folders_of_killed_runs(parent)
            folders[parent] = _make_folder(parent)
        section["nvme_path"] = str(folders[parent])
    return config


def remove_folders_of_killed_runs(parent: Path) -> None:
    """Delete the folders in `parent` that no process holds any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # held, or another rank was faster
            descriptor = _lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def remove_own_folders() -> None:
    """Delete what this process has on NVMe; calling it again does nothing."""
    while _held:
        folder, descriptor = _held.popitem()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make_folder(parent: Path) -> Path:
    atexit.register(remove_own_folders)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with contextlib.suppress(OSError):
            descriptor = _lock(folder)
            if folder.exists():
                _held[folder] = descriptor
                return folder
            os.close(descriptor)
        # Another rank took it for one of a killed run, in the moment before it was locked.


def _lock(folder: Path) -> int:
    """Return a descriptor of the folder that holds its lock; the kernel releases it when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
