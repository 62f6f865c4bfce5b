"""What ranks would hold if ZeRO could cut anywhere, against counts of a real model's parameters."""

import json

import pytest

from benchmarks.engine_formulas import ideal_states, predicted_sent
from benchmarks.engine_suite import _MODEL, EngineCase, _sent_rows
from benchmarks.peers.registry import OURS
from benchmarks.report import markdown_table
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


@pytest.mark.parametrize(("ranks", "reduced", "all_reduced"), [(2, 1.5, 2), (4, 3.75, 6)])
def test_bytes_sent_over_gloo(ranks, reduced, all_reduced):
    """Of all ranks: gradients of two micro-batches, and of the new weights each rank's share to all others."""
    config = MoEConfig(**_MODEL)
    weights = 2 * sum(parameter.numel() for parameter in MoEForCausalLM(config).parameters())
    for reduces, factor in ((True, reduced), (False, all_reduced)):
        case = EngineCase(ranks, 2, None, reduces)
        expected = 2 * factor * weights + (ranks - 1) * weights
        assert predicted_sent(config, case.setting) == pytest.approx(expected)


def test_bytes_sent_are_told_beside_the_formula(tmp_path):
    config = MoEConfig(**_MODEL)
    cases = [EngineCase(2, 2, None), EngineCase(2, 2, None, reduces=False)]
    for case, over in zip(cases, (1.01, 1.02), strict=True):
        (tmp_path / case.name).mkdir()
        sent = over * predicted_sent(config, case.setting)
        for rank, share in enumerate((0.25, 0.75)):
            (tmp_path / case.name / f"rank_{rank}.json").write_text(json.dumps({"sent": share * sent}))
    reduced, all_reduced = rows = list(_sent_rows(cases, config, tmp_path))
    assert [row.values["sent_over_formula"] for row in rows] == pytest.approx([1.01, 1.02])
    assert reduced.case == all_reduced.case
    compared = {row["metric"]: row["ratio"] for row in as_json(rows) if row["peer_name"] != OURS}
    # 2 x 1.5 and 2 x 2 times the weights for gradients, once for weights.
    assert compared["sent_bytes"] == pytest.approx(1.02 * 5 / (1.01 * 4))
    assert compared["sent_formula_bytes"] is None and compared["sent_over_formula"] is None
    assert "| 1.0100 |" in markdown_table(rows) and "| 1.0200 |" in markdown_table(rows)


def test_a_file_holds_it_beside_the_formula():
    values = {"bytes": 11, "formula_bytes": 10, "over_formula": 1.1, "over_ideal": 1.375}
    (row,) = as_json([Row("memory", "ZeRO 2", "formula", values=values)])
    assert (row["ratio"], row["over_ideal"]) == (1.1, 1.375)
