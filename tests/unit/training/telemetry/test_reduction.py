"""One message for sums and maxima, played through with ranks that take turns."""

import math

import pytest
import torch
import torch.distributed as dist

from moe_hf.training.telemetry.reduction import reduce_over_ranks


def play(monkeypatch, of_ranks: list[tuple[dict, dict]]) -> list:
    """Return what each rank gets; ranks send in a first round, and receive the sum of all messages in a second."""
    messages: list[torch.Tensor] = []
    state = {"rank": 0, "receives": False}

    def all_reduce(tensor: torch.Tensor) -> None:
        assert tensor.dtype == torch.float64
        if state["receives"]:
            tensor.copy_(sum(messages))
        else:
            messages.append(tensor.clone())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(of_ranks))
    monkeypatch.setattr(dist, "get_rank", lambda: state["rank"])
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    results = []
    for state["receives"] in (False, True):
        results = []
        for state["rank"], tensors in enumerate(of_ranks):
            results.append(reduce_over_ranks(*tensors))
    assert len(messages) == len(of_ranks), "one message for each rank"
    return results


def test_sums_and_maxima_of_three_ranks(monkeypatch):
    given = [
        (
            {"counts": torch.tensor([[10**15 + rank, 2], [3, 4 * rank]]), "loss": torch.tensor(0.5 + rank)},
            {"logits": torch.tensor([-1.0 - rank, 2.0 * rank]), "memory": torch.tensor(float(7 - rank))},
        )
        for rank in range(3)
    ]
    for sums, maxima in play(monkeypatch, given):
        assert sums["counts"].tolist() == [[3 * 10**15 + 3, 6], [9, 12]]
        assert sums["loss"].shape == () and sums["loss"] == 4.5
        assert maxima["logits"].tolist() == [-1.0, 4.0]
        assert maxima["memory"].shape == () and maxima["memory"] == 7.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is(monkeypatch, value):
    given = [
        ({"a": torch.tensor([1.0, value if rank else 1.0])}, {"m": torch.tensor([0.5, value if rank else 1.0])})
        for rank in range(2)
    ]
    for sums, maxima in play(monkeypatch, given):
        assert sums["a"].tolist() == pytest.approx([2.0, 1.0 + value], nan_ok=True)
        assert maxima["m"].tolist() == pytest.approx([0.5, 1.0 if value < 0 else value], nan_ok=True)


def test_one_process_sends_nothing():
    sums, maxima = reduce_over_ranks({"a": torch.tensor([3, 4])}, {})
    assert sums["a"].tolist() == [3.0, 4.0] and maxima == {}


def test_what_was_given_is_left_alone():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    sums, _ = reduce_over_ranks({"losses": losses}, {"losses": losses})
    sums["losses"][0] = 9.0
    assert losses.tolist() == [1.0, 2.0]
