"""Whether other work on the machine makes times meaningless."""

import time

import psutil

from moe_hf.errors import UserError

MOST_OTHERS = 0.1
"""Share of all cores that other processes may use."""

_LOOK_SECONDS = 2.0


class Busy(UserError):
    """Other processes use the machine, so times mean nothing."""


class LoadMeter:
    """Tells how many cores other processes have used since it was last asked."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.most = 0.0
        self._last = self._read()

    def _read(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        own = self._process.cpu_times()
        return busy - (own.user + own.system), sum(times) - getattr(times, "guest", 0.0)

    def others(self) -> float:
        """Return the cores that others have used on average since the last call."""
        before, self._last = self._last, self._read()
        # Of all cores together, so that it does not matter how time is told here.
        share = (self._last[0] - before[0]) / max(self._last[1] - before[1], 1e-3)
        cores = max(0.0, share) * (psutil.cpu_count() or 1)
        self.most = max(self.most, cores)
        return cores


class LoadWatch:
    """Has rounds made again during which others have worked, and refuses to go on when that does not end.

    Args:
        allowed: measure all the same, and remember that the machine was busy.
        meter: tells the cores that others use.
    """

    def __init__(self, allowed: bool, meter: LoadMeter | None = None) -> None:
        self.allowed, self.disturbed = allowed, False
        self._meter = LoadMeter() if meter is None else meter
        self._limit = MOST_OTHERS * (psutil.cpu_count() or 1)
        self._spare = 0

    def look(self, seconds: float = _LOOK_SECONDS) -> None:
        """See for a while what others do.

        Raises:
            Busy: too much.
        """
        self._meter.others()
        time.sleep(seconds)
        if (cores := self._meter.others()) > self._limit:
            self._refuse(cores)

    def begin(self, num_rounds: int) -> None:
        """Start to look at rounds; as many may be made again as there are."""
        self._spare = num_rounds
        self._meter.others()

    def accepts(self) -> bool:
        """Say whether the round that has just ended counts.

        Raises:
            Busy: it does not, and too many before it did not either.
        """
        cores = self._meter.others()
        if cores <= self._limit:
            return True
        if self._spare == 0 or self.allowed:
            self._refuse(cores)
            return True
        self._spare -= 1
        return False

    def _refuse(self, cores: float) -> None:
        self.disturbed = True
        if not self.allowed:
            raise Busy(
                f"Other processes use {cores:.1f} of {psutil.cpu_count()} cores, more than {MOST_OTHERS:.0%}, so times "
                "would mean nothing; end them, or add --allow-busy to see numbers that cannot be used."
            )
