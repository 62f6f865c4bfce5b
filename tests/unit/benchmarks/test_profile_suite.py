"""Profiles: what belongs to which kind, and that shares are those of the time."""

import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import profile_suite
from benchmarks.cases import LayerCase, StepCase
from benchmarks.peers.base import Layer
from benchmarks.peers.blocks import Block
from benchmarks.peers.models import OurModel, TransformersModel
from benchmarks.profile_suite import KINDS, kind_of, milliseconds_by_kind, run_layer_profiles, run_step_profiles
from benchmarks.results import FAILED, UNAVAILABLE, Row, as_json

CASE = LayerCase("small", 64, 32, 4, 2, 24)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::_grouped_mm", "products"),
        ("aten::mul", "rest"),
        ("aten::index_put_", "moved"),
        ("aten::copy_", "moved"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("moe_hf::experts_backward", "kernel"),
        ("autograd::engine::evaluate_function: MmBackward0", "rest"),
    ],
)
def test_operators_have_a_kind(operator, kind):
    assert kind_of(operator) == kind


def test_time_goes_to_the_operator_that_takes_it():
    a = torch.randn(384, 384)

    def run() -> None:
        for _ in range(20):
            torch.mm(a, a)
        a.clone()

    found = milliseconds_by_kind(run, "cpu")
    assert set(found) == set(KINDS)
    assert found["products"] > 5 * found["moved"] > 0
    begin = time.perf_counter()
    run()
    assert found["products"] < 5e3 * (time.perf_counter() - begin)


def test_kernels_of_a_gpu_count_once(monkeypatch):
    """They are told by themselves and with the operator that launched them."""
    events = [
        SimpleNamespace(key="aten::mm", device_type=DeviceType.CPU, self_device_time_total=3e3),
        SimpleNamespace(key="cutlass_gemm", device_type=DeviceType.CUDA, self_device_time_total=3e3),
        SimpleNamespace(key="aten::mul", device_type=DeviceType.CPU, self_device_time_total=1e3),
        SimpleNamespace(key="vectorized_elementwise", device_type=DeviceType.CUDA, self_device_time_total=1e3),
    ]
    watched = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profile_suite, "profile", lambda activities: nullcontext(watched))
    found = milliseconds_by_kind(lambda: None, "cuda")
    assert (found["products"], found["rest"], sum(found.values())) == (3.0, 1.0, 4.0)


class Broken(Block):
    """A peer that computes something else, or raises in its fifth pass: two are compared, two warm up."""

    def __init__(self, name: str, wrong: bool) -> None:
        super().__init__("mixtral", "eager", name)
        self.wrong = wrong

    def build(self, case, weights):
        layer, calls = super().build(case, weights), []

        def forward(tokens):
            calls.append(tokens)
            if not self.wrong and len(calls) == 5:
                raise RuntimeError("illegal memory access")
            return layer.forward(tokens) * (1.001 if self.wrong else 1)

        return Layer(layer.module, forward, layer.gradients)


class Watching:
    """Has the first round made again."""

    def __init__(self) -> None:
        self.begun, self.asked = [], 0

    def begin(self, num_rounds):
        self.begun.append(num_rounds)

    def accepts(self):
        self.asked += 1
        return self.asked > 1


def test_layers():
    cases = [CASE, replace(CASE, routing="balanced")]
    broken = [Broken("wrong", wrong=True), Broken("raising", wrong=False)]
    peers = [Block("ours", "moe_hf", "ours"), *broken, Block("mixtral", "sonicmoe")]
    watch = Watching()
    ours, wrong, raising, unavailable = run_layer_profiles(cases, peers, "cpu", 3, watch)
    assert watch.begun == [3] and watch.asked == 4
    assert ours.config == "layer small" and 0 < ours.values["max_error"] <= 1e-5
    shares = {name: value for name, value in ours.values.items() if name.startswith("share_of_")}
    assert len(shares) == len(KINDS) and sum(shares.values()) == pytest.approx(1.0)
    assert shares["share_of_products"] > 0 and shares["share_of_kernel"] > 0 and ours.values["products_of_ceiling"] > 0
    assert wrong.status == FAILED and "relative error of output" in wrong.reason
    assert raising.status == FAILED and "illegal memory access" in raising.reason
    assert unavailable.status == UNAVAILABLE and "sonic-moe" in unavailable.reason
    assert not any(row["ratio"] for row in as_json([ours]) if row["metric"].startswith("share_of_"))


def test_the_ceiling_is_that_of_the_same_moment(monkeypatch):
    """A machine that runs at half of its speed now and then does so for both; A B A B, a ceiling behind each."""
    order, speeds = [], iter([1, 1, 1, 1, 1, 2, 4, 1, 1, 1])
    speed = 1

    def by_kind(run, device):
        nonlocal speed
        order.append(run)
        speed = next(speeds)
        return dict.fromkeys(KINDS, 1.0 * speed) | {"products": 10.0 * speed}

    def ceiling():
        order.append("ceiling")
        return {"matmul": 8.0 * speed}

    monkeypatch.setattr(profile_suite, "milliseconds_by_kind", by_kind)
    rows = {name: Row("profile", "layer", name) for name in "AB"}
    assert not profile_suite._profile({"A": "A", "B": "B"}, ceiling, "cpu", 3, None, rows)
    assert order[::2] == [*"AABB", *"ABABAB"] and set(order[1::2]) == {"ceiling"}
    assert all(row.values["products_of_ceiling"] == pytest.approx(0.8) for row in rows.values())
    assert rows["A"].values["share_of_products"] == pytest.approx(10 / (10 + len(KINDS) - 1))


@pytest.mark.usefixtures("alone")
def test_steps():
    case = StepCase("small", 32, 8, 2, 24, 1, 4, 2, 96, batch=2, sequence_length=24)
    wrong = TransformersModel("wrong", "eager")
    wrong.loss = lambda model, tokens: 1.001 * TransformersModel.loss(wrong, model, tokens)
    peers = {"mixtral": [OurModel("ours"), TransformersModel("mixtral/eager", "eager"), wrong]}
    watch = Watching()
    *rows, failed = run_step_profiles([case], peers.__getitem__, "cpu", 2, watch)
    assert [row.peer for row in rows] == ["ours", "mixtral/eager"] and watch.asked == 3
    assert failed.status == FAILED and "relative error of gradient" in failed.reason
    for row in rows:
        assert row.values["share_of_attention"] > 0 and row.values["share_of_optimizer"] > 0
        assert 0 < row.values["max_error"] <= 1e-2
    assert rows[0].values["share_of_kernel"] > 0 == rows[1].values["share_of_kernel"]
