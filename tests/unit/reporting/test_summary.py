"""The cells of the table at the head of a report."""

import pytest
from metrics_files import MadeUpRun, write_entries, write_run

from moe_hf.reporting.runs import read_runs
from moe_hf.reporting.summary import summarize


def table(*paths) -> dict[str, list[str]]:
    return {column.heading: column.cells for column in summarize(read_runs(paths))}


def test_every_cell_of_one_run(tmp_path):
    entries = [
        {"step": 10, "num_tokens": 1_000_000, "loss": 9.0, "ce_loss": 8.0, "tokens_per_second": 1000.0},
        {
            "step": 20,
            "num_tokens": 2_345_678,
            "loss": 3.5,
            "ce_loss": 3.25,
            "tokens_per_second": 5000.0,
            "max_vio/layer_0": 0.5,
            "max_vio/layer_1": 1.0,
            "load_entropy/layer_0": 0.9,
            "load_entropy/layer_1": 0.8,
            "dead_experts/layer_0": 1,
            "dead_experts/layer_1": 2,
            "dropped_fraction": 0.0123,
        },
        {"step": 20, "num_tokens": 2_345_678, "eval_loss": 3.3},
    ]
    run = write_run(tmp_path / "run", MadeUpRun(capacity=1.5, num_entries=1))
    (run / "metrics.jsonl").unlink()
    (write_entries(tmp_path / "entries", entries) / "metrics.jsonl").rename(run / "metrics.jsonl")
    assert table(run) == {
        "Balancing": ["aux_loss (global)"],
        "Capacity": ["1.5 (position)"],
        "Steps": ["20"],
        "Tokens": ["2.35 M"],
        "Training loss": ["3.2500"],
        "Eval. loss": ["3.3000"],
        "MaxVio": ["0.750"],
        "Load entropy": ["0.8500"],
        "Dead experts": ["3"],
        "Dropped": ["1.23 %"],
        "Tokens/s": ["3,000"],
    }


def test_what_a_run_lacks_is_a_dash_and_what_all_lack_is_no_column(tmp_path):
    kinds = {"dense": MadeUpRun("dense", num_entries=2), "old": MadeUpRun(old=True, num_entries=2)}
    cells = table(*(write_run(tmp_path / name, kind) for name, kind in kinds.items()))
    assert cells["Balancing"] == ["dense", "aux_loss (global)"]
    assert cells["Tokens"][1] == "–" and cells["Tokens"][0] != "–"
    assert not cells.keys() & {"MaxVio", "Load entropy", "Dead experts", "Dropped", "Capacity"}


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    run = write_entries(tmp_path / "run", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}])
    assert table(run)["Training loss"] == ["not finite"]


@pytest.mark.parametrize("tokens, text", [(512, "512"), (99_960, "100 k"), (1.5e9, "1.5 B"), (2e12, "2 T")])
def test_tokens_have_three_digits(tmp_path, tokens, text):
    run = write_entries(tmp_path / "run", [{"step": 1, "loss": 1.0, "num_tokens": tokens}])
    assert table(run)["Tokens"] == [text]
