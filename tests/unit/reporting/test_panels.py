"""Which numbers a curve is made of."""

import numpy as np
import pytest

from moe_hf.reporting.panels import Panel, thin
from moe_hf.reporting.runs import Run, Table


def run_of(*entries: dict) -> Run:
    return Run(
        "run", None, Table([{"step": 1 + row, "loss": 1.0} | entry for row, entry in enumerate(entries)]), Table([])
    )


LAYERS = run_of({"x/layer_0": 1.0, "x/layer_1": 4.0}, {"x/layer_0": 3.0, "x/layer_1": None})


@pytest.mark.parametrize("how, expected", [("mean", [2.5, 3.0]), ("max", [4.0, 3.0]), ("sum", [5.0, 3.0])])
def test_layers_become_one_number(how, expected):
    np.testing.assert_array_equal(Panel("", "x", over_layers=how).training(LAYERS), expected)
    np.testing.assert_array_equal(
        Panel("", "x", over_layers=how, factor=100).training(LAYERS), 100 * np.array(expected)
    )


def test_the_total_stands_in_for_layers_that_were_not_logged():
    old = run_of({"x": 7.0})
    assert Panel("", "x", over_layers="mean", total="x").training(old).tolist() == [7.0]
    assert Panel("", "x", over_layers="mean").training(old) is None
    assert not Panel("", "x", over_layers="mean").is_in(old)


def test_the_range_of_biases_is_taken_in_each_layer():
    run = run_of({"high/layer_0": 2.0, "low/layer_0": -1.0, "high/layer_1": 1.0, "low/layer_1": 0.5})
    assert Panel("", "high", over_layers="mean", minus="low").training(run).tolist() == [(3.0 + 0.5) / 2]
    assert Panel("", "high", over_layers="mean", minus="absent").training(run) is None


def test_nothing_finite_is_nothing_to_draw():
    assert not Panel("", "grad_norm").is_in(run_of({"grad_norm": None}))
    assert Panel("", "x", by_layer=True).is_in(LAYERS)
    assert not Panel("", "x", by_layer=True).is_in(run_of({"x/layer_4": 1.0}))


def test_thinning_averages_consecutive_entries():
    x, y = np.arange(1.0, 8.0), np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, 2.0])
    places, means = thin(x, y, most=4)
    np.testing.assert_array_equal(places, [2, 4, 6, 7])
    np.testing.assert_array_equal(means, [2, 5, np.nan, 2])
    assert thin(x, y, most=7)[1] is y
    assert len(thin(np.arange(1001.0), np.ones((1001, 3)), most=400)[1]) <= 400
