"""Give a machine back when it is wanted: on SIGTERM or SIGUSR1 save a checkpoint, and end with an exit code of its own.

Schedulers send one of these signals some time before they take a machine away. One process that receives it is enough:
at the end of every optimizer step the processes tell each other, so that all stop after the same step.
"""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ..parallel.processes import world_size

EXIT_CODE = 75
"""What sysexits.h calls a temporary failure: start the same command again."""

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Preempted(Exception):
    """Training has stopped on a signal; the message says after which step, and where the checkpoint is."""


class SignalWatch:
    """Remembers that this process was asked to stop, instead of dying of it."""

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[int, Callable | int | None] = {}

    def start(self) -> None:
        """Watch from now on, where Python lets us: in the main thread."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def stop(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """Return the signal that this or another process has received, the same on all of them (a collective call)."""
        received = self._received
        if dist.is_initialized() and world_size() > 1:
            highest = torch.tensor(received, device=device)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            received = int(highest)
        return signal.Signals(received) if received else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number


def spare_workers(loader: DataLoader) -> None:
    """Let the worker processes of a data loader outlive a SIGTERM to the whole tree of processes.

    The deepspeed launcher passes SIGTERM on to all descendants. A worker that died of it would take the training
    process along before its checkpoint is saved. Workers end by themselves when their parent does.
    """
    # Accelerate's loaders hold the one that starts the workers.
    for each in (loader, getattr(loader, "base_dataloader", loader)):
        with contextlib.suppress(AttributeError):
            each.worker_init_fn = functools.partial(_ignore_signals, each.worker_init_fn)


def _ignore_signals(initialize: Callable | None, worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)
