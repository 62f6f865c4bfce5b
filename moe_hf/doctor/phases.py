"""Where every process of the self-test is: each tells it in a file of its own, which whoever started them reads.

A process that hangs cannot be asked for anything; what it has told last, and the stack that a signal makes the
interpreter write, are there all the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_STACK_SIGNAL = signal.SIGUSR2
_STACK_SECONDS = 1.0
# What waits for others, and says nothing about what it waits with.
_LIBRARIES = re.compile(r"/torch/|/threading\.py|/selectors\.py")


@dataclass(frozen=True)
class Phase:
    """What one process does."""

    rank: int
    number: int
    """How many phases it has begun."""
    name: str
    pid: int


class PhaseLog:
    """Tells what this process does, from within it.

    Args:
        folder: one for all processes.
        rank: of this one.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path, self._rank, self._number = folder / f"{rank}.json", rank, 0
        self.name = ""
        folder.mkdir(parents=True, exist_ok=True)
        # Kept open: the handler writes to its descriptor.
        self._stack = open(folder / f"{rank}.stack", "w")  # noqa: SIM115
        faulthandler.register(_STACK_SIGNAL, self._stack, all_threads=False)

    def begin(self, name: str) -> None:
        """Say what is done from now on."""
        self.name, self._number = name, self._number + 1
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(Phase(self._rank, self._number, name, os.getpid()))))
        os.replace(temporary, self._path)


def read_phases(folder: Path) -> dict[int, Phase]:
    """Return what each process that has begun said last, by its rank."""
    phases = [Phase(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return {phase.rank: phase for phase in sorted(phases, key=lambda phase: phase.rank)}


def describe_stall(folder: Path, num_ranks: int) -> str:
    """Return which process is behind and in which phase, and what all of them are executing.

    Args:
        folder: of the phases.
        num_ranks: processes that were started.
    """
    phases = read_phases(folder)
    missing = [rank for rank in range(num_ranks) if rank not in phases]
    if missing:
        return f"{_ranks(missing)} did not get as far as importing moe_hf"
    for phase in phases.values():
        with contextlib.suppress(OSError):
            os.kill(phase.pid, _STACK_SIGNAL)
    time.sleep(_STACK_SECONDS)
    by_place: dict[tuple[int, str], list[int]] = {}
    for phase in phases.values():
        place = f"{phase.name!r}{_executing(folder / f'{phase.rank}.stack')}"
        by_place.setdefault((phase.number, place), []).append(phase.rank)
    first, *others = [f"{_ranks(ranks)} in {place}" for (_, place), ranks in sorted(by_place.items())]
    return "; ".join([f"{first} is behind" if others else first, *others])


def _executing(stack: Path) -> str:
    """Return the function of the package or of DeepSpeed that a dumped stack is in."""
    lines = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack.read_text() if stack.exists() else "")
    for path, line, function in lines:
        if not _LIBRARIES.search(path):
            return f" (at {function}, {'/'.join(Path(path).parts[-2:])}:{line})"
    return ""


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
