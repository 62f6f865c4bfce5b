"""The lines and tables that a person reads while training."""

import pytest
from transformers import TrainerState

from moe_hf.training.telemetry.console import (
    ConsoleCallback,
    PlainConsoleCallback,
    format_entry,
    format_logs,
    format_router_table,
)
from moe_hf.training.telemetry.loads import LatestLoads

LOGS = {
    "loss": 7.13014,
    "grad_norm": 1.5,
    "grad_norm/router": 0.5,
    "learning_rate": 3e-4,
    "ce_loss": 7.118,
    "aux_loss": 2.12,
    "z_loss": 0.5,
    "aux_loss/layer_1": 1.02,
    "aux_loss/layer_3": 1.1,
    "max_vio/layer_1": 0.4,
    "max_vio": 0.4249,
    "dead_experts": 0,
    "tokens_per_second": 12345.6,
    "skipped_steps": 0,
}


def test_line_shows_sums_and_means_over_layers():
    assert format_logs(20, 400, LOGS) == (
        "step 20/400 | loss 7.1301 | ce 7.1180 | aux 2.120 | z 0.500 | MaxVio 0.42 | grad norm 1.500 | lr 3.00e-04 | "
        "12,346 tokens/s"
    )


def test_line_shows_what_only_some_runs_have():
    line = format_logs(20, 400, LOGS | {"dead_experts": 3, "dropped_fraction": 0.0213, "mfu": 0.4118})
    assert "| MaxVio 0.42 | dead 3 | dropped 2.1% | grad norm" in line
    assert line.endswith("| 12,346 tokens/s | MFU 41.2%")
    # A capacity that drops nothing is worth knowing; dead experts that there are not, are not.
    assert "| dropped 0.0% |" in format_logs(20, 400, LOGS | {"dropped_fraction": 0.0})
    assert "dead" not in format_logs(20, 400, LOGS)


def test_line_does_not_grow_with_the_layers():
    line = format_logs(200, 4000, LOGS | {"mfu": 0.4})
    layers = {f"{name}/layer_{i}": 1.0 for i in range(100) for name in ("aux_loss", "z_loss", "max_vio", "load_cv")}
    assert format_logs(200, 4000, LOGS | {"mfu": 0.4} | layers) == line
    assert len(line) < 140


def test_line_of_a_dense_model_has_no_router_losses():
    assert format_logs(1, 2, {"loss": 1.0, "ce_loss": 1.0, "grad_norm": None, "skipped_steps": 0}) == (
        "step 1/2 | loss 1.0000 | ce 1.0000"
    )


def test_skipped_steps_are_told_once_there_are_some():
    assert "skipped" not in format_logs(1, 2, LOGS)
    assert format_logs(1, 2, LOGS | {"loss": float("nan"), "skipped_steps": 3}).endswith("tokens/s | skipped 3")
    assert "| loss nan |" in format_logs(1, 2, LOGS | {"loss": float("nan")})


def test_line_of_an_evaluation():
    logs = {"eval_loss": 4.84609, "eval_perplexity": 127.2427, "eval_tokens": 74, "eval_runtime": 0.03}
    assert format_logs(6, 6, logs) == "step 6/6 | eval loss 4.8461 | perplexity 127.24"


def test_line_of_anything_else_lists_its_numbers():
    logs = {"train_runtime": 3.14159, "epoch": 1, "note": "not a number"}
    assert format_logs(6, 6, logs) == "step 6/6 | train_runtime 3.142 | epoch 1"


# --------------------------------------------------------------------------------------------------------------------
# The table of an evaluation


def evaluation(max_vios: dict[int, float]) -> dict[str, float]:
    logs = {"eval_loss": 2.0, "eval_perplexity": 7.389, "eval_max_vio": 0.1}
    for layer, max_vio in max_vios.items():
        logs |= {f"eval_max_vio/layer_{layer}": max_vio, f"eval_load_cv/layer_{layer}": 0.25}
        logs |= {f"eval_load_entropy/layer_{layer}": 0.9871, f"eval_dead_experts/layer_{layer}": layer % 2}
    return logs


def test_table_has_a_row_for_each_sparse_layer():
    loads = LatestLoads(eval={"layer_1": [0.1, 0.6, 0.3], "layer_10": [0.5, 0.25, 0.25]})
    assert format_entry(6, 9, evaluation({10: 0.5, 1: 0.8}), loads) == (
        "step 6/9 | eval loss 2.0000 | perplexity 7.39\n"
        "layer | MaxVio |    CV | load entropy | dead | most loaded expert (share)\n"
        "    1 |   0.80 | 0.250 |        0.987 |    1 |                  1 (60.0%)\n"
        "   10 |   0.50 | 0.250 |        0.987 |    0 |                  0 (50.0%)"
    )


def test_long_tables_keep_the_worst_layers():
    max_vios = {layer: (layer * 7 % 48) / 10 for layer in range(48)}
    lines = format_router_table(evaluation(max_vios), {}).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "28 more layers, none with a larger MaxVio, are not shown."
    shown = [int(line.split("|")[0]) for line in lines[1:-1]]
    worst = sorted(max_vios, key=max_vios.get)[-20:]
    assert shown == sorted(worst)
    assert len({len(line) for line in lines[:-1]}) == 1


def test_table_needs_neither_loads_nor_all_columns():
    row = format_router_table({"eval_max_vio/layer_2": 0.5}, {}).splitlines()[1]
    assert [cell.strip() for cell in row.split("|")] == ["2", "0.50", "-", "-", "-", "-"]


def test_dense_models_have_no_table():
    assert format_entry(1, 2, evaluation({}), LatestLoads()) == "step 1/2 | eval loss 2.0000 | perplexity 7.39"


def test_training_entries_have_no_table():
    assert "\n" not in format_entry(1, 2, LOGS, LatestLoads({"layer_1": [1.0]}, {"layer_1": [1.0]}))


# --------------------------------------------------------------------------------------------------------------------
# Callbacks


@pytest.mark.parametrize("callback", [ConsoleCallback, PlainConsoleCallback])
def test_console_shows_the_text_on_the_first_rank_only(callback, capsys):
    loads = LatestLoads(eval={"layer_1": [0.4, 0.6]})
    for is_main in (True, False):
        state = TrainerState(global_step=4, max_steps=9, is_world_process_zero=is_main)
        callback(loads).on_log(None, state, None, logs={"loss": 1.0})
        callback(loads).on_log(None, state, None, logs={"eval_loss": 1.0, "eval_max_vio/layer_1": 0.2})
        callback(loads).on_log(None, state, None, logs={})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 4/9 | loss 1.0000", "step 4/9 | eval loss 1.0000"]
    assert lines[2].startswith("layer |") and lines[3].endswith("1 (60.0%)") and len(lines) == 4
