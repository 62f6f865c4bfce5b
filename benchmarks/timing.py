"""Interleaved rounds, and the ratios of what they measure."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Sample = dict[str, float]
"""Milliseconds by name of what was timed: `forward`, `forward_backward`, `step`."""

# A contestant that takes longer than this runs in fewer rounds.
_SLOW_MS = 1000.0
_FEWEST_ROUNDS = 10


class CpuClock:
    """Marks points in time on the CPU."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def mark(self) -> None:
        """Remember now."""
        self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the time of each mark since the beginning."""
        return [1e3 * (mark - self.marks[0]) for mark in self.marks[1:]]


# About 10 ms of a GPU at 2 GHz: longer than Python takes for the kernels of one layer, or for the first of a model.
_HEAD_START_CYCLES = 20_000_000


class CudaClock:
    """Marks points in the current stream of the GPU, which is made to wait first, while the host runs ahead.

    In the time is what the GPU does from its first mark on, gaps between kernels included where the host falls behind
    all the same: where it waits for the GPU, or where it launches more than fits into the wait. Not in it is what
    Python takes to launch what was queued by the end of the wait: as in training, where the layers before it keep the
    GPU busy.
    """

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        self.marks = [self._record()]

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self) -> None:
        """Remember when the GPU has come here."""
        self.marks.append(self._record())

    def milliseconds(self) -> list[float]:
        """Return the time of each mark since the beginning."""
        torch.cuda.synchronize()
        return [self.marks[0].elapsed_time(mark) for mark in self.marks[1:]]


def reason_of(error: Exception) -> str:
    """Return why something was not measured, without the error itself, which would keep tensors alive."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def clock_of(device: str) -> CpuClock | CudaClock:
    """Start a clock."""
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass(frozen=True)
class Ratio:
    """How many times faster one is than another, over rounds.

    Args:
        median: of the rounds' ratios.
        lower: their first quartile.
        upper: their third quartile.
        rounds: in which both have run.
    """

    median: float
    lower: float
    upper: float
    rounds: int


class Rounds:
    """What all contestants have taken in each round; `None` where one did not take part.

    Those that raised, and why, are in `failed`; of them no time is known.
    """

    def __init__(self, names: list[str]) -> None:
        self.samples: dict[str, list[Sample | None]] = {name: [] for name in names}
        self.failed: dict[str, str] = {}

    def run(self, name: str, contestant: Callable[[], Sample]) -> Sample | None:
        """Run a contestant once, and return what it took; one that raises is not run again."""
        if name in self.failed:
            return None
        try:
            return contestant()
        except Exception as error:  # whatever another library raises is a result of this measurement
            self.failed[name] = reason_of(error)
            self.samples[name].clear()
            return None

    def add(self, of_round: Mapping[str, Sample | None]) -> None:
        """Add one round."""
        for name, samples in self.samples.items():
            samples.append(of_round.get(name))

    def median(self, name: str, what: str) -> float | None:
        """Return the median time of a contestant, `None` where it never ran or does not do that."""
        found = [sample[what] for sample in self.samples.get(name, []) if sample is not None and what in sample]
        return statistics.median(found) if found else None

    def ratio(self, ours: str, peer: str, what: str) -> Ratio | None:
        """Return the time of the peer over that of ours, round by round."""
        pairs = zip(self.samples.get(ours, []), self.samples.get(peer, []), strict=False)
        ratios = [p[what] / o[what] for o, p in pairs if o and p and what in o and what in p]
        if not ratios:
            return None
        if len(ratios) == 1:
            return Ratio(ratios[0], ratios[0], ratios[0], 1)
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, lower, upper, len(ratios))


class Watch(Protocol):
    """Looks after the machine while times are taken; `watching.LoadWatch` is the one that does."""

    def begin(self, num_rounds: int) -> None:
        """Start to look: rounds begin now."""

    def accepts(self) -> bool:
        """Say whether the round that has just ended counts, instead of being made again."""


def interleave(contestants: Mapping[str, Callable[[], Sample]], num_rounds: int, watch: Watch | None = None) -> Rounds:
    """Time contestants in turn, A B C A B C …, after two passes of each to warm up; one that raises leaves the others.

    Args:
        contestants: run once and tell how long it took.
        num_rounds: in which the fast ones take part; one that takes over a second runs in a quarter of them.
        watch: asked behind every round.
    """
    rounds, rounds_of = Rounds(list(contestants)), {}
    for name, run in contestants.items():
        rounds.run(name, run)
        warm = rounds.run(name, run)
        slow = warm is not None and max(warm.values()) > _SLOW_MS
        rounds_of[name] = min(num_rounds, max(_FEWEST_ROUNDS, num_rounds // 4)) if slow else num_rounds
    if watch is not None:
        watch.begin(num_rounds)
    done = 0
    while done < num_rounds and len(rounds.failed) < len(contestants):
        of_round = {name: rounds.run(name, run) for name, run in contestants.items() if done < rounds_of[name]}
        if watch is None or watch.accepts():
            rounds.add(of_round)
            done += 1
    return rounds
