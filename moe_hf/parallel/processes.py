"""Which process this is, and how several of them agree on an error."""

import atexit
import os
import sys
import threading
from typing import NoReturn

import torch.distributed as dist

from ..errors import UserError


def rank() -> int:
    """Rank of this process, also before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes the launcher started, also before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave(code: int) -> NoReturn:
    """End this process with an exit code, without tearing the interpreter down.

    Threads of torch and gloo outlive the process group. One of them that needs the interpreter while it is ending makes
    C++ abort the process ("terminate called without an active exception"), after all work is done: the launcher would
    take a finished run for a failed one. What Python does before it ends is done here: other threads finish, and exit
    handlers run.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def raise_together(error: UserError | None) -> None:
    """Raise the error of the lowest rank that has one, on all ranks (a collective call).

    Args:
        error: what this rank met, or `None`.
    """
    errors = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met
