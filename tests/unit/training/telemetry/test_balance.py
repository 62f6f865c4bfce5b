"""Measures of balance against their formulas, expert by expert, and at both ends of what is possible."""

import math
import random

import numpy as np
import pytest

from moe_hf.training.telemetry.balance import (
    balance_of,
    coefficient_of_variation,
    load_shares,
    max_violation,
    normalized_entropy,
    steps_without_tokens,
)

UNEVEN = [[*random.Random(seed).choices([0, 1, 3, 10, 250], k=6), 7] for seed in range(20)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("loads", UNEVEN, ids=str)
def test_formulas(loads):
    """Each written out for one layer, and computed together with another layer."""
    average = mean(loads)
    variance = mean([(load - average) ** 2 for load in loads])
    entropy = -sum(load / sum(loads) * math.log(load / sum(loads)) for load in loads if load)
    together = np.array([loads, [1] * len(loads)])
    expected = {
        "max_vio": (max(loads) - average) / average,
        "load_cv": math.sqrt(variance) / average,
        "load_entropy": entropy / math.log(len(loads)),
    }
    for name, value in balance_of(together)._asdict().items():
        assert value.shape == (2,) and value.dtype == np.float64
        assert value[0] == pytest.approx(expected[name], rel=1e-12), name


def test_measures_are_not_exchanged():
    counts = np.array(UNEVEN)
    balance = balance_of(counts)
    np.testing.assert_array_equal(balance.max_vio, max_violation(counts))
    np.testing.assert_array_equal(balance.load_cv, coefficient_of_variation(counts))
    np.testing.assert_array_equal(balance.load_entropy, normalized_entropy(counts))


@pytest.mark.parametrize("num_experts", [2, 8, 256])
def test_ends_of_the_scale(num_experts):
    even, one = np.full((1, num_experts), 12), np.eye(num_experts)[:1] * 12
    assert [measure[0] for measure in balance_of(even)] == pytest.approx([0, 0, 1], abs=1e-12)
    assert [measure[0] for measure in balance_of(one)] == pytest.approx(
        [num_experts - 1, math.sqrt(num_experts - 1), 0], abs=1e-12
    )


def test_only_shares_matter():
    counts = np.array(UNEVEN)
    for once, many in zip(balance_of(counts), balance_of(counts * 10**9), strict=True):
        np.testing.assert_allclose(once, many, rtol=1e-12)


def test_a_single_expert_is_balanced():
    assert [measure.tolist() for measure in balance_of(np.array([[5], [9]]))] == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize("num_experts", [1, 4])
def test_of_a_layer_without_assignments_nothing_is_known(num_experts):
    counts = np.array([[0] * num_experts, [3] * num_experts])
    for measure in balance_of(counts):
        assert math.isnan(measure[0]) and not math.isnan(measure[1])


def test_shares_sum_to_one():
    shares = load_shares(np.array([[1, 3], [0, 5]]))
    assert shares.tolist() == [[0.25, 0.75], [0.0, 1.0]]


def test_steps_without_tokens_grow_by_the_interval_and_start_anew():
    idle = np.array([[0, 0, 0], [0, 0, 0]])
    idle = steps_without_tokens(idle, np.array([[5, 0, 0], [0, 1, 0]]), num_steps=10)
    assert idle.tolist() == [[0, 10, 10], [10, 0, 10]]
    idle = steps_without_tokens(idle, np.array([[0, 2, 0], [0, 0, 9]]), num_steps=3)
    assert idle.tolist() == [[3, 0, 13], [13, 3, 0]]
    assert idle.dtype == np.int64
