"""Remove what DeepSpeed's CPU communication leaves behind in shared memory."""

import contextlib
import os
from pathlib import Path


def remove_shared_buffers(address: str | None = None, port: int | None = None) -> None:
    """Delete the all-reduce buffers of a run, 69 MB for each rank, which DeepSpeed creates and never removes.

    They are named after user, address and port of the run. A process that still has one mapped keeps it until it ends.

    Args:
        address: of the run's rank 0; without one, as for `port`, that of the run that this process belongs to.
        port: it is reached at.
    """
    address, port = address or os.environ.get("MASTER_ADDR"), port or os.environ.get("MASTER_PORT")
    if address is None or port is None or not hasattr(os, "getuid"):
        return
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_*"):
        with contextlib.suppress(OSError):  # another rank was faster
            path.unlink()
