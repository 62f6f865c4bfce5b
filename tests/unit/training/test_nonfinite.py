"""A step with a NaN or infinite gradient changes nothing, and counts."""

import copy
import math

import pytest
import torch

from moe_hf.training.nonfinite import NonFiniteGuard, SkipCounter


@pytest.fixture(params=[torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def training(request):
    """Two parameters, an optimizer that a guard watches, and a function that makes one step of a loss."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    unused = torch.nn.Parameter(torch.ones(2))
    optimizer = request.param([*parameters, unused], lr=0.1, weight_decay=0.5)
    guard = NonFiniteGuard()
    guard.attach(optimizer)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        (factor * parameters[0].square().sum() + parameters[1].square().sum()).backward()
        optimizer.step()

    return parameters, optimizer, guard, step


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(training, factor):
    parameters, optimizer, guard, step = training
    step(1.0)
    assert not guard.skipped
    weights, state = copy.deepcopy(parameters), copy.deepcopy(optimizer.state_dict())
    step(factor)
    assert guard.skipped
    assert all(torch.equal(p, before) for p, before in zip(parameters, weights, strict=True))
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][index][name])), name


def test_the_step_after_it_is_made(training):
    parameters, _, guard, step = training
    step(math.nan)
    before = copy.deepcopy(parameters)
    step(1.0)
    assert not guard.skipped
    assert all((p != old).all() and p.isfinite().all() for p, old in zip(parameters, before, strict=True))


def test_large_but_finite_gradients_are_no_reason_to_skip(training):
    _, _, guard, step = training
    step(1e18)
    assert not guard.skipped


def test_one_element_is_enough():
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    guard = NonFiniteGuard()
    guard.attach(optimizer)
    parameter.grad = torch.ones(1000)
    parameter.grad[637] = math.nan
    optimizer.step()
    assert guard.skipped and torch.equal(parameter, torch.ones(1000))


def test_steps_are_counted_in_all_and_in_a_row():
    counter = SkipCounter(limit=3)
    reached = [counter.add(skipped) for skipped in (True, True, False, True, True, True, True, False)]
    assert reached == [False, False, False, False, False, True, True, False]
    assert (counter.total, counter.in_a_row) == (6, 0)
