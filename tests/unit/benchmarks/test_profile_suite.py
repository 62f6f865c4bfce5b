"""Profiles: what belongs to which kind, and that shares are those of the time."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.cases import LayerCase, StepCase
from benchmarks.peers.blocks import Block
from benchmarks.peers.models import OurModel, TransformersModel
from benchmarks.profile_suite import KINDS, kind_of, milliseconds_by_kind, run_layer_profiles, run_step_profiles
from benchmarks.results import FAILED, UNAVAILABLE, as_json

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


class Broken(Block):
    """A peer that cannot be built."""

    def build(self, case, weights):
        raise RuntimeError("no kernel image")


def test_layers():
    cases = [CASE, replace(CASE, routing="balanced")]
    peers = [Block("ours", "moe_hf", "ours"), Broken("mixtral", "eager"), Block("mixtral", "sonicmoe")]
    ours, broken, unavailable = run_layer_profiles(cases, peers, "cpu")
    assert ours.config == "layer small"
    shares = {name: value for name, value in ours.values.items() if name.startswith("share_of_")}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["share_of_products"] > 0 and shares["share_of_kernel"] > 0 and ours.values["products_of_ceiling"] > 0
    assert broken.status == FAILED and "no kernel image" in broken.reason
    assert unavailable.status == UNAVAILABLE and "sonic-moe" in unavailable.reason
    assert not any(row["ratio"] for row in as_json([ours]) if row["metric"].startswith("share_of_"))


@pytest.mark.usefixtures("alone")
def test_steps():
    case = StepCase("small", 32, 8, 2, 24, 1, 4, 2, 96, batch=2, sequence_length=24)
    peers = {"mixtral": [OurModel("ours"), TransformersModel("mixtral/eager", "eager")]}
    rows = list(run_step_profiles([case], peers.__getitem__, "cpu"))
    assert [row.peer for row in rows] == ["ours", "mixtral/eager"]
    for row in rows:
        assert row.values["share_of_attention"] > 0 and row.values["share_of_optimizer"] > 0
    assert rows[0].values["share_of_kernel"] > 0 == rows[1].values["share_of_kernel"]
