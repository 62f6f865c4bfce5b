"""End all processes with the same sentence when one of them meets an error.

The others may be waiting in a collective call that will never complete, so they cannot be asked by another one. They
are told through the key-value store that `torch.distributed` keeps for its own rendezvous, which a thread of every
process watches.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from .processes import raise_together, rank, world_size
from .shared_memory import remove_shared_buffers
from .swap_folder import remove_own_folders

EXIT_CODE = 2
_SENTENCE, _PRINTED, _CLAIMS = "moe_hf/failure", "moe_hf/failure/printed", "moe_hf/failure/claims"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0


class FailureRelay:
    """Carries one process's error to the others."""

    def __init__(self) -> None:
        self._store = None
        self._printing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Start watching for errors of other processes; a process group must exist. Does nothing when called again."""
        if self._store is not None or world_size() == 1 or not dist.is_initialized():
            return
        # A connection of its own: the group's blocks while it waits for a peer.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
        self._thread = threading.Thread(target=self._poll, name="failure-relay", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching once all processes have come to their end (a collective call); the second call does nothing."""
        if self._store is not None and not self._stopped.is_set():
            # Rank 0 takes the store with it; to a process that still watched this would look like a failure.
            raise_together(None)
            self._stopped.set()
            # A thread that is in the store's C++ code while the interpreter ends would abort the process.
            self._thread.join()

    def exit(self, sentence: str) -> None:
        """Print `sentence` once over all processes and end this one with exit code 2; does not return."""
        try:
            if self._store is not None:
                self._store.set(_SENTENCE, sentence)
            self._finish(sentence)
        finally:
            _exit_now()

    def await_end_if_told(self) -> None:
        """Do not return while an error is ending all processes: what the first to go have broken here is no news."""
        if self._store is None:
            return
        with contextlib.suppress(Exception):  # the store ends with rank 0
            if self._store.check([_SENTENCE]):
                time.sleep(_PATIENCE_SECONDS)

    def _poll(self) -> None:
        try:
            while not self._store.check([_SENTENCE]):
                if self._stopped.wait(_POLL_SECONDS):
                    return
            self._finish(self._store.get(_SENTENCE).decode())
        except Exception:
            # The store lives in rank 0; without it that process has ended, and with it the run.
            self._await_termination(_POLL_SECONDS)
            if self._stopped.is_set():
                return
        _exit_now()

    def _finish(self, sentence: str) -> None:
        if rank() == 0 or not self._is_printed_by_rank_0():
            # Never released: whichever thread comes second waits here until the first has ended the process.
            self._printing.acquire()
            if self._store is None or self._store.add(_CLAIMS, 1) == 1:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
            if self._store is not None:
                self._store.set(_PRINTED, "1")
        if rank() == 0 and self._store is not None:
            # Rank 0 holds the store: give the others a moment to see that they may go.
            time.sleep(2 * _POLL_SECONDS)

    def _is_printed_by_rank_0(self) -> bool:
        """Leave the word to rank 0 for a while: it may not know of the error, or be where its threads cannot run."""
        if self._store is None:
            # If rank 0 meets the same error, the launcher ends us here. If not, one process of each machine speaks.
            self._await_termination(_PATIENCE_SECONDS)
            return os.environ.get("LOCAL_RANK", "0") != "0"
        try:
            self._store.wait([_PRINTED])
        except dist.DistStoreError:
            return False
        return True

    @staticmethod
    def _await_termination(seconds: float) -> None:
        """Wait for the launcher, which ends everyone as soon as the first of us is gone."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: _exit_now())
        time.sleep(seconds)


def _exit_now() -> None:
    """End without leaving the process group: another thread may be stuck in a collective call for ever."""
    remove_shared_buffers()
    remove_own_folders()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
