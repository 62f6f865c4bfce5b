"""Rounds, ratios, and the refusal on a busy machine, on given times."""

import pytest
import torch

from benchmarks.timing import Rounds, clock_of, interleave
from benchmarks.watching import Busy, LoadWatch


def test_ratio_is_the_median_over_rounds():
    rounds = Rounds(["ours", "peer"])
    for ours, peer in [(1.0, 2.0), (2.0, 8.0), (4.0, 12.0), (1.0, 100.0), (10.0, 15.0)]:
        rounds.add({"ours": {"step_ms": ours}, "peer": {"step_ms": peer}})
    ratio = rounds.ratio("ours", "peer", "step_ms")
    # 2, 4, 3, 100, 1.5: not the ratio of the medians, 12 / 2.
    assert (ratio.median, ratio.lower, ratio.upper, ratio.rounds) == (3.0, 2.0, 4.0, 5)
    assert rounds.median("peer", "step_ms") == 12.0


def test_rounds_without_one_of_them_do_not_count():
    rounds = Rounds(["ours", "slow"])
    rounds.add({"ours": {"step_ms": 1.0}, "slow": {"step_ms": 9.0}})
    rounds.add({"ours": {"step_ms": 3.0}})
    assert rounds.ratio("ours", "slow", "step_ms").rounds == 1
    assert rounds.ratio("ours", "slow", "step_ms").median == 9.0
    assert rounds.ratio("ours", "slow", "forward_ms") is None
    assert rounds.ratio("ours", "absent", "step_ms") is None
    assert rounds.median("absent", "step_ms") is None


def contestant(name: str, milliseconds: float, order: list[str]):
    def run():
        order.append(name)
        return {"step_ms": milliseconds}

    return run


def test_rounds_are_interleaved_after_warming_up():
    order = []
    interleave({name: contestant(name, 1.0, order) for name in "ABC"}, 3)
    assert "".join(order) == "AABBCC" + "ABC" * 3


def test_slow_ones_run_in_fewer_rounds():
    order = []
    rounds = interleave({"A": contestant("A", 1.0, order), "B": contestant("B", 1001.0, order)}, 16)
    assert order.count("A") == 18 and order.count("B") == 2 + 10
    assert rounds.ratio("A", "B", "step_ms").rounds == 10


def failing(at: int):
    """Return a contestant that raises when it is run for the given time, counted from 1."""
    calls = []

    def run():
        calls.append(len(calls) + 1)
        if calls[-1] >= at:
            raise RuntimeError("illegal memory access")
        return {"step_ms": 1.0}

    return run, calls


@pytest.mark.parametrize("at", [1, 2, 4])
def test_who_raises_leaves_the_others(at):
    order, (broken, calls) = [], failing(at)
    rounds = interleave({"A": contestant("A", 1.0, order), "B": broken, "C": contestant("C", 2.0, order)}, 3)
    assert order.count("A") == order.count("C") == 2 + 3 and rounds.ratio("A", "C", "step_ms").rounds == 3
    assert calls[-1] == at and rounds.failed == {"B": "RuntimeError: illegal memory access"}
    # What it took before it failed is no result.
    assert rounds.median("B", "step_ms") is None and rounds.ratio("A", "B", "step_ms") is None


def test_nothing_goes_on_where_all_raise():
    meter = Meter(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    watch = LoadWatch(allowed=False, meter=meter)
    assert interleave({"A": failing(3)[0], "B": failing(4)[0]}, 5, watch).failed.keys() == {"A", "B"}
    # Of five rounds two were made; it was asked ahead of them too.
    assert len(meter.cores) == 6 - 3


class Gpu:
    """Works through its queue only when the host waits for it; a kernel takes a millisecond."""

    def __init__(self, monkeypatch) -> None:
        gpu, self.now, self.queue, self.waited = self, 0.0, [], 0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.queue.append(self)

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.drain)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue.append(cycles / 2e6))

    def drain(self) -> None:
        self.waited += 1
        for item in self.queue:
            if isinstance(item, float):
                self.now += item
            else:
                item.at = self.now
        self.queue.clear()


def test_gpu_waits_while_the_host_runs_ahead(monkeypatch):
    """It waits behind what ran before and ahead of the first mark, and nobody waits for it until the end."""
    gpu = Gpu(monkeypatch)
    gpu.queue.append(50.0)
    clock = clock_of("cuda")
    assert gpu.waited == 1 and gpu.now == 50.0
    for milliseconds in (2.0, 3.0):
        gpu.queue.append(milliseconds)
        clock.mark()
    assert gpu.waited == 1 and isinstance(gpu.queue[0], float) and 5 <= gpu.queue[0] <= 20
    assert clock.milliseconds() == pytest.approx([2.0, 5.0])


class Meter:
    """Tells what it was given, one value for each question."""

    def __init__(self, *cores: float) -> None:
        self.cores = list(cores)

    def others(self) -> float:
        return self.cores.pop(0)


def test_a_disturbed_round_is_made_again():
    order = []
    watch = LoadWatch(allowed=False, meter=Meter(0.0, 0.0, 9.0, 0.0, 0.0))
    rounds = interleave({"A": contestant("A", 1.0, order)}, 3, watch)
    assert order.count("A") == 2 + 4 and len(rounds.samples["A"]) == 3
    assert not watch.disturbed


def test_a_busy_machine_is_refused():
    watch = LoadWatch(allowed=False, meter=Meter(0.0, 9.0))
    with pytest.raises(Busy, match=r"Other processes use 9\.0 of \d+ cores, more than 10%"):
        watch.look(seconds=0)
    watch = LoadWatch(allowed=False, meter=Meter(0.0, 9.0, 9.0, 9.0))
    with pytest.raises(Busy):
        interleave({"A": contestant("A", 1.0, [])}, 2, watch)


def test_where_it_is_allowed_the_results_are_marked():
    watch = LoadWatch(allowed=True, meter=Meter(0.0, 0.0, 9.0))
    rounds = interleave({"A": contestant("A", 1.0, [])}, 2, watch)
    assert len(rounds.samples["A"]) == 2 and watch.disturbed
