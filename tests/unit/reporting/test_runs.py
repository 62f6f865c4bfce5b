"""Logs as arrays, runs by names that tell them apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from metrics_files import MadeUpRun, write_entries, write_run

from moe_hf.errors import ConfigError, DataError
from moe_hf.reporting.runs import Table, distinct_names, read_runs


def test_columns_and_layers():
    table = Table(
        [
            {"step": 1, "loss": None, "x/layer_10": 1.0, "x/layer_2": 2.0, "expert_load": {10: np.array([1.0, 0.0])}},
            {"step": 2, "loss": 2.0, "x/layer_2": 3, "words": "none", "flag": True},
        ]
    )
    np.testing.assert_array_equal(table.column("loss"), [np.nan, 2.0])
    assert table.layers("x") == [2, 10]
    np.testing.assert_array_equal(table.by_layer("x"), [[2.0, 1.0], [3.0, np.nan]])
    np.testing.assert_array_equal(table.loads[10], [[1.0, 0.0], [np.nan, np.nan]])
    for key in ("words", "flag", "absent"):
        assert table.column(key) is None and table.by_layer(key) is None and table.last(key) is None
    assert table.last("loss") == 2.0 and len(table) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_nan(value):
    assert np.isnan(Table([{"step": 1, "loss": value}]).last("loss"))


def test_names_tell_runs_apart():
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/b/y/run"), Path("/a/other")]
    assert distinct_names(paths) == ["x/run", "a/y/run", "b/y/run", "other"]
    assert distinct_names([Path("/a/x/run")]) == ["run"]


def test_the_configuration_is_that_of_the_export_or_the_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", MadeUpRun("loss_free", num_entries=2))
    for step in (9, 10):
        folder = run / f"checkpoint-{step}" / "hf"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"num_experts": step}))
    assert read_runs([run])[0].config["router_balancing"] == "loss_free"
    (run / "hf" / "config.json").write_text("{")
    assert read_runs([run])[0].config == {"num_experts": 10}


def test_cross_entropy_is_the_loss_where_it_was_logged(tmp_path):
    with_parts = write_entries(tmp_path / "new", [{"step": 1, "loss": 2.0, "ce_loss": 1.5}])
    without = write_entries(tmp_path / "old", [{"step": 1, "loss": 2.0}])
    assert [run.loss_key for run in read_runs([with_parts, without])] == ["ce_loss", "loss"]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is not a folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"empty/metrics.jsonl cannot be read"):
        read_runs([tmp_path / "empty"])
    run = write_entries(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    with pytest.raises(ConfigError, match="is given 2 times"):
        read_runs([run, tmp_path / "empty" / ".." / "run"])
