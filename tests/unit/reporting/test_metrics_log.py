"""What counts of a metrics.jsonl, and what is refused."""

import json

import numpy as np
import pytest

from moe_hf.errors import DataError
from moe_hf.reporting.metrics_log import read_metrics_log


def written(tmp_path, *lines: dict | bytes, end: bytes = b"\n"):
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(texts) + end)
    return path


def test_kinds_of_entries(tmp_path):
    log = read_metrics_log(
        written(
            tmp_path,
            {"step": 1, "loss": 3.0, "expert_load": {"layer_3": [0.25, 0.75], "layer_11": [1, 0]}},
            {"step": 1, "eval_loss": 2.9},
            b"",
            {"step": 2, "loss": None},
            {"step": 2, "train_runtime": 9.0},
        )
    )
    assert [entry["loss"] for entry in log.training] == [3.0, None]
    assert [entry["eval_loss"] for entry in log.evaluations] == [2.9]
    loads = log.training[0]["expert_load"]
    assert list(loads) == [3, 11] and loads[3].dtype == np.float32 and loads[3].tolist() == [0.25, 0.75]
    assert log.notes == []


def test_a_resumed_run_counts_from_where_it_went_back(tmp_path):
    """Killed after step 5, resumed from step 2, ended at step 4: what it had logged of 3, 4 and 5 is void."""
    first = [entry for step in range(1, 6) for entry in ({"step": step, "loss": 1.0}, {"step": step, "eval_loss": 1.0})]
    second = [entry for step in (3, 4) for entry in ({"step": step, "loss": 2.0}, {"step": step, "eval_loss": 2.0})]
    log = read_metrics_log(written(tmp_path, *first, *second))
    assert [(entry["step"], entry["loss"]) for entry in log.training] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert [(e["step"], e["eval_loss"]) for e in log.evaluations] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert log.notes == ["Resumed before step 3: what had been logged from there on was left out (3 training entries)."]


def test_a_later_evaluation_of_the_same_step_counts(tmp_path):
    log = read_metrics_log(written(tmp_path, *({"step": 7, "eval_loss": loss} for loss in (3.0, 2.0))))
    assert [entry["eval_loss"] for entry in log.evaluations] == [2.0]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\0\0\0", b"\xff{", b"{"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    log = read_metrics_log(written(tmp_path, {"step": 1, "loss": 1.0}, torn, end=b""))
    assert len(log.training) == 1 and log.notes == ["The last line of metrics.jsonl is torn and was left out."]


def test_a_whole_last_line_without_its_end_counts(tmp_path):
    log = read_metrics_log(written(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, end=b""))
    assert len(log.training) == 2 and log.notes == []


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b'{"step": 2, "lo', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[1, 2]", "is not an object with an integer 'step'"),
        (b'{"loss": 1.0}', "is not an object with an integer 'step'"),
        (b'{"step": 2, "loss": 1, "expert_load": [1]}', "expert_load in line 2"),
        (b'{"step": 2, "loss": 1, "expert_load": {"layer_1": ["x"]}}', "'layer_1' of expert_load in line 2"),
        (b'{"step": 2, "loss": 1, "expert_load": {"layer_1": []}}', "'layer_1' of expert_load in line 2"),
        (b'{"step": 2, "loss": 1, "expert_load": {"one": [1]}}', "'one' of expert_load in line 2"),
    ],
)
def test_garbage_is_refused_with_file_and_line(tmp_path, line, complaint):
    path = written(tmp_path, {"step": 1, "loss": 1.0}, line)
    with pytest.raises(DataError) as caught:
        read_metrics_log(path)
    assert complaint in str(caught.value) and f"line 2 of {path}" in str(caught.value)


def test_another_number_of_experts_is_refused(tmp_path):
    lines = [{"step": n, "loss": 1.0, "expert_load": {"layer_0": [1 / n] * n}} for n in (2, 3)]
    with pytest.raises(DataError, match="3 experts in layer 0 at step 3, but 2 before"):
        read_metrics_log(written(tmp_path, *lines))


def test_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_metrics_log(tmp_path / "metrics.jsonl")
    for lines in ([], [{"step": 3, "train_runtime": 1.0}]):
        with pytest.raises(DataError, match="has no entry with a loss"):
            read_metrics_log(written(tmp_path, *lines))
