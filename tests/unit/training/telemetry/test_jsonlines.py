"""The lines of metrics.jsonl: valid JSON whatever was measured, with the loads that belong to the entry."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from moe_hf.training.telemetry.jsonlines import JsonLinesCallback
from moe_hf.training.telemetry.loads import LatestLoads

LOADS = {"layer_1": [0.25, 0.75]}
EVAL_LOADS = {"layer_1": [0.5, 0.5]}


def state_of(step: int, is_main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=9, is_world_process_zero=is_main)


def log(folder, logs: dict, step: int = 1, loads: LatestLoads | None = None, is_main: bool = True) -> None:
    args = SimpleNamespace(output_dir=str(folder))
    JsonLinesCallback(loads or LatestLoads()).on_log(args, state_of(step, is_main), None, logs=logs)


def entries(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_every_entry_is_one_line_of_json(tmp_path):
    for step in (1, 2):
        log(tmp_path / "out", {"loss": 0.5 * step, "num_tokens": 70 * step}, step)
    log(tmp_path / "out", {"loss": 9.0}, 3, is_main=False)
    log(tmp_path / "out", {}, 3)
    assert entries(tmp_path / "out") == [
        {"step": 1, "loss": 0.5, "num_tokens": 70},
        {"step": 2, "loss": 1.0, "num_tokens": 140},
    ]


def test_loads_go_with_the_entry_they_belong_to(tmp_path):
    loads = LatestLoads(LOADS, EVAL_LOADS)
    for logs in ({"loss": 1.0}, {"eval_loss": 2.0}, {"train_runtime": 3.0}):
        log(tmp_path, logs, loads=loads)
    assert entries(tmp_path) == [
        {"step": 1, "loss": 1.0, "expert_load": LOADS},
        {"step": 1, "eval_loss": 2.0, "eval_expert_load": EVAL_LOADS},
        {"step": 1, "train_runtime": 3.0},
    ]


def test_several_callbacks_read_the_same_loads():
    loads = LatestLoads(LOADS, None)
    assert [loads.of({"loss": 1.0}) for _ in range(3)] == [LOADS] * 3
    assert loads.of({"eval_loss": 1.0}) is None


def test_loads_do_not_enter_the_logs_of_the_others(tmp_path):
    """TensorBoard, which is called with the same dictionary, warns of each value that is no number."""
    logs = {"loss": 1.0}
    log(tmp_path, logs, loads=LatestLoads(LOADS, EVAL_LOADS))
    assert logs == {"loss": 1.0}


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN; other programs than Python refuse it."""
    logs = {"loss": float("nan"), "grad_norm": float("inf"), "aux_loss": -float("inf"), "lr": 0.1, "skipped_steps": 3}
    log(tmp_path, logs, loads=LatestLoads({"layer_0": [float("nan"), 1.0]}))
    assert entries(tmp_path) == [
        {
            "step": 1,
            "loss": None,
            "grad_norm": None,
            "aux_loss": None,
            "lr": 0.1,
            "skipped_steps": 3,
            "expert_load": {"layer_0": [None, 1.0]},
        }
    ]


def test_training_does_not_die_of_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    log(tmp_path, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").is_dir()


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', "garbage"])
def test_a_line_that_a_killed_run_has_torn_is_cut_off(tmp_path, torn):
    log(tmp_path, {"loss": 1.0}, 1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    callback = JsonLinesCallback(LatestLoads())
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state_of(1, is_main=False), None)
    assert (tmp_path / "metrics.jsonl").read_text().endswith(torn), "only one process writes"
    callback.on_train_begin(args, state_of(1), None)
    log(tmp_path, {"loss": 2.0}, 2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]


def test_a_fresh_folder_has_nothing_to_cut(tmp_path):
    JsonLinesCallback(LatestLoads()).on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state_of(0), None)
    assert not (tmp_path / "metrics.jsonl").exists()
