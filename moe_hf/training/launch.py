"""Run a program in one of many processes so that all of them end together, with one word on what went wrong."""

import sys
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from ..errors import UserError
from ..parallel.failure import FailureRelay
from ..parallel.processes import leave, rank
from ..parallel.shared_memory import remove_shared_buffers
from ..parallel.swap_folder import remove_own_folders
from .preemption import EXIT_CODE, Preempted


def run(program: Callable, argv: list[str], description: str | None = None) -> None:
    """Call `program(argv, relay, description)` and end the process if the user has made a mistake.

    A `UserError` is printed once over all processes and ends them all with exit code 2, wherever they are. A run that
    stops on a signal ends all of them with exit code 75. Any other exception keeps its traceback.
    """
    relay = FailureRelay()
    try:
        program(argv, relay, description)
        relay.stop()
    except Preempted as stop:
        if rank() == 0:
            print(stop, file=sys.stderr, flush=True)
        relay.stop()
        sys.exit(EXIT_CODE)
    except UserError as error:
        relay.exit(" ".join(str(error).split()))
    except Exception:
        relay.await_end_if_told()
        raise
    finally:
        # A process group that is alive at interpreter exit aborts the process.
        if dist.is_initialized():
            dist.destroy_process_group()
        remove_shared_buffers()
        remove_own_folders()


def main(program: Callable, argv: list[str], description: str | None = None) -> NoReturn:
    """Call `run` and end the process, with exit code 0 where it has come to its end."""
    try:
        run(program, argv, description)
    except SystemExit as end:
        leave(int(end.code or 0))
    leave(0)
