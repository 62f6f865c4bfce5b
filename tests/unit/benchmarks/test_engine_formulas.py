"""What ranks would hold if ZeRO could cut anywhere, against counts of a real model's parameters."""

import pytest

from benchmarks.engine_formulas import ideal_states
from benchmarks.engine_suite import _MODEL, EngineCase
from benchmarks.results import Row, as_json
from moe_hf import MoEConfig, MoEForCausalLM


@pytest.mark.parametrize(("ranks", "ep"), [(2, None), (2, 2), (4, 2), (4, 4)])
def test_ideal_states(ranks, ep):
    config = MoEConfig(**_MODEL)
    sizes = {True: 0, False: 0}
    for name, parameter in MoEForCausalLM(config).named_parameters():
        sizes[".experts." in name] += parameter.numel()
    whole = 2 * (sizes[False] + sizes[True] // (ep or 1))
    divided = 2 * sum(sizes.values()) / ranks
    for stage, weights, gradients in ((1, whole, whole), (2, whole, divided), (3, divided, divided)):
        found = ideal_states(config, EngineCase(ranks, stage, ep).setting)
        assert found == pytest.approx({"weights": weights, "gradients": gradients, "optimizer": 6 * divided})


def test_a_file_holds_it_beside_the_formula():
    values = {"bytes": 11, "formula_bytes": 10, "over_formula": 1.1, "over_ideal": 1.375}
    (row,) = as_json([Row("memory", "ZeRO 2", "formula", values=values)])
    assert (row["ratio"], row["over_ideal"]) == (1.1, 1.375)
