"""Axes, colours and names."""

import pytest
from metrics_files import MadeUpRun, write_entries, write_run

from moe_hf.reporting.runs import read_runs
from moe_hf.reporting.style import COLOURS, run_colour, run_dashes, short_names, shorten, time_axis


@pytest.mark.parametrize(
    "tokens, label, unit",
    [(900, "tokens seen", 1), (5e3, "tokens seen (thousands)", 1e3), (2e6, "tokens seen (millions)", 1e6)],
)
def test_the_unit_gives_short_numbers(tmp_path, tokens, label, unit):
    run = write_entries(tmp_path / "run", [{"step": 1, "num_tokens": tokens, "loss": 1.0}])
    axis = time_axis(read_runs([run]))
    assert (axis.key, axis.label, axis.unit) == ("num_tokens", label, unit)
    assert axis.end(read_runs([run])) == tokens / unit


def test_steps_align_runs_where_one_does_not_tell_its_tokens(tmp_path):
    paths = [write_run(tmp_path / str(old), MadeUpRun(old=old, num_entries=2)) for old in (False, True)]
    assert time_axis(read_runs(paths)).key == "step"
    assert time_axis(read_runs(paths[:1])).key == "num_tokens"


def test_no_two_of_many_runs_look_the_same():
    looks = {(run_colour(place), str(run_dashes(place))) for place in range(4 * len(COLOURS))}
    assert len(looks) == 4 * len(COLOURS)
    assert len({run_colour(place) for place in range(8)}) == 8


def test_short_names_stay_distinct(tmp_path):
    assert shorten("abcdefghij", 5) == "ab…ij" and shorten("abc", 5) == "abc"
    names = ["a" * 30 + str(place) + "b" * 30 for place in range(3)]
    runs = read_runs([write_entries(tmp_path / name, [{"step": 1, "loss": 1.0}]) for name in names])
    short = short_names(runs, 20)
    assert len(set(short)) == 3 and all(len(name) <= 20 for name in short)
