"""Remove the locks of killed processes, for which DeepSpeed would wait for ever.

DeepSpeed compiles some of its operators when they are first used, and torch guards the folder of each with a file named
`lock`. A process that is killed while it holds one leaves it behind, and every later run on that machine hangs.
"""

import contextlib
import os
import time
from pathlib import Path

import psutil

# Compiling takes a few minutes at most.
_LONGEST_BUILD_SECONDS = 600.0
_POLL_SECONDS = 5.0
_NETWORK = ("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "nfs", "pvfs", "smb", "weka")


def remove_stale_build_locks() -> None:
    """Delete locks that no process holds; call it in one process of each machine, before any other can hold one.

    On a disk that machines share, a process of another one may hold it, which cannot be seen from here: there a lock is
    stale when it is older than any compilation takes, and until then this waits.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not Path("/proc/self/fd").is_dir():
        return  # nobody says here who holds a file
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with contextlib.suppress(OSError):  # released meanwhile
            _remove_if_stale(lock)


def _remove_if_stale(lock: Path) -> None:
    is_told = False
    while not _is_held(lock):
        age = time.time() - lock.stat().st_mtime
        if age > _LONGEST_BUILD_SECONDS or not _is_on_network(lock):
            lock.unlink()
            return
        if not is_told:
            print(f"Waiting for another machine to release {lock}; delete it if none is compiling.", flush=True)
            is_told = True
        time.sleep(_POLL_SECONDS)


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as its holder does."""
    held = os.path.realpath(lock)
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # of another user, or ended meanwhile
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) == held:
                        return True
    return False


def _is_on_network(path: Path) -> bool:
    """Whether the file system is one that several machines share."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    nearest = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return nearest is not None and nearest.fstype.startswith(_NETWORK)
