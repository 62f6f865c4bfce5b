"""Rounds, ratios, and the refusal on a busy machine, on given times."""

import pytest

from benchmarks.timing import Rounds, interleave
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
    assert order.count("A") == 18 and order.count("B") == 2 + 7
    assert rounds.ratio("A", "B", "step_ms").rounds == 7


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
