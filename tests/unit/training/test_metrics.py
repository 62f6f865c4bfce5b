"""What is logged: means over steps of sums over micro-batches, and lines that a person reads."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from moe_hf.modeling_moe import MoECausalLMOutput
from moe_hf.training import metrics as metrics_module
from moe_hf.training.metrics import (
    ConsoleCallback,
    JsonLinesCallback,
    PlainConsoleCallback,
    TrainingMetrics,
    format_logs,
)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock whose time is set by the test."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def micro_batch(ce: float, aux: list[float] | None = None, z: list[float] | None = None) -> MoECausalLMOutput:
    losses = {} if aux is None else {"layer_aux_losses": torch.tensor(aux), "layer_z_losses": torch.tensor(z)}
    return MoECausalLMOutput(ce_loss=torch.tensor(ce, requires_grad=True), **losses)


def test_shares_of_micro_batches_add_up_and_steps_are_averaged(clock):
    metrics = TrainingMetrics([1, 3], shares_are_sums=True)
    for step in range(2):
        for share in (0.5, 1.5):
            metrics.add_micro_batch(micro_batch(share + step, [share, 2 * share], [3 * share, 4 * share]))
        metrics.add_step(torch.tensor(30))
    clock.now += 4.0
    # Per step: 0.5 + 1.5 and 1.5 + 2.5 of cross-entropy; the router's parts are the same in both.
    assert metrics.pop() == {
        "ce_loss": 3.0,
        "aux_loss": 6.0,
        "z_loss": 14.0,
        "aux_loss/layer_1": 2.0,
        "aux_loss/layer_3": 4.0,
        "z_loss/layer_1": 6.0,
        "z_loss/layer_3": 8.0,
        "tokens_per_second": 15.0,
    }


def test_every_entry_begins_anew(clock):
    metrics = TrainingMetrics([0], shares_are_sums=True)
    for value in (1.0, 5.0):
        metrics.add_micro_batch(micro_batch(value, [value], [value]))
        metrics.add_step(10)
        clock.now += 2.0
        logged = metrics.pop()
        assert (logged["ce_loss"], logged["aux_loss"], logged["tokens_per_second"]) == (value, value, 5.0)
    assert metrics.pop() == {}


def test_micro_batches_without_a_step_are_not_reported(clock):
    metrics = TrainingMetrics([], shares_are_sums=True)
    assert metrics.pop() == {}
    metrics.add_micro_batch(micro_batch(1.0))
    assert metrics.pop() == {}
    metrics.add_step(4)
    clock.now += 1.0
    assert metrics.pop() == {"ce_loss": 1.0, "tokens_per_second": 4.0}


def test_means_of_ranks_are_averaged_over_ranks(clock, monkeypatch):
    """Where every rank's loss is a mean, the sum over ranks is divided by their number."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for shares_are_sums, expected in ((True, 8.0), (False, 2.0)):
        metrics = TrainingMetrics([0], shares_are_sums=shares_are_sums)
        metrics.add_micro_batch(micro_batch(8.0, [8.0], [8.0]))
        metrics.add_step(1)
        clock.now += 1.0
        logged = metrics.pop()
        assert logged["ce_loss"] == logged["aux_loss/layer_0"] == logged["z_loss"] == expected


def test_time_of_saving_is_left_out_of_the_throughput(clock):
    metrics = TrainingMetrics([], shares_are_sums=True)
    metrics.add_micro_batch(micro_batch(1.0))
    metrics.add_step(1000)
    clock.now += 50.0
    metrics.restart_clock()
    metrics.add_micro_batch(micro_batch(3.0))
    metrics.add_step(20)
    clock.now += 2.0
    assert metrics.pop() == {"ce_loss": 2.0, "tokens_per_second": 10.0}
    metrics.add_micro_batch(micro_batch(3.0))
    metrics.add_step(20)
    metrics.restart_clock()
    assert metrics.pop() == {"ce_loss": 3.0}


def test_rounded_parts_are_summed_in_float32():
    metrics = TrainingMetrics([0], shares_are_sums=True)
    for _ in range(300):  # bfloat16 cannot count beyond 256
        part = torch.ones(1, dtype=torch.bfloat16)
        metrics.add_micro_batch(MoECausalLMOutput(ce_loss=part[0], layer_aux_losses=part, layer_z_losses=part))
    metrics.add_step(1)
    logged = metrics.pop()
    assert logged["ce_loss"] == logged["aux_loss"] == logged["z_loss"] == 300.0


# --------------------------------------------------------------------------------------------------------------------
# Lines

LOGS = {
    "loss": 7.13014,
    "grad_norm": 1.5,
    "learning_rate": 3e-4,
    "ce_loss": 7.118,
    "aux_loss": 2.12,
    "z_loss": 0.5,
    "aux_loss/layer_1": 1.02,
    "aux_loss/layer_3": 1.1,
    "z_loss/layer_1": 0.31,
    "z_loss/layer_3": 0.19,
    "tokens_per_second": 12345.6,
    "skipped_steps": 0,
}


def test_line_of_few_layers_names_each():
    assert format_logs(20, 400, LOGS) == (
        "step 20/400 | loss 7.1301 | ce 7.1180 | aux 1.020 1.100 | z 0.310 0.190 | grad norm 1.500 | lr 3.00e-04 | "
        "12,346 tokens/s"
    )


def test_line_of_many_layers_gives_their_range():
    def line(num_layers: int) -> str:
        layers = {f"aux_loss/layer_{i}": 1 + i / 10 for i in reversed(range(num_layers))}
        return format_logs(1, 2, {"loss": 1.0} | layers | {key.replace("aux", "z"): 2.0 for key in layers})

    assert "| aux 1.700 1.600 1.500 1.400 1.300 1.200 1.100 1.000 |" in line(8)
    assert line(9) == "step 1/2 | loss 1.0000 | aux 1.000…1.800 | z 2.000…2.000"


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
# Callbacks


def state_of(step: int, is_main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=9, is_world_process_zero=is_main)


def test_every_entry_is_one_line_of_json(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "out"))
    for step in (1, 2):
        JsonLinesCallback().on_log(args, state_of(step), None, logs={"loss": 0.5 * step})
    JsonLinesCallback().on_log(args, state_of(3, is_main=False), None, logs={"loss": 9.0})
    JsonLinesCallback().on_log(args, state_of(3), None, logs={})
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN; other programs than Python refuse it."""
    logs = {"loss": float("nan"), "grad_norm": float("inf"), "aux_loss": -float("inf"), "lr": 0.1, "skipped_steps": 3}
    JsonLinesCallback().on_log(SimpleNamespace(output_dir=str(tmp_path)), state_of(1), None, logs=logs)
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 1, "loss": None, "grad_norm": None, "aux_loss": None, "lr": 0.1, "skipped_steps": 3}
    assert json.loads(line, parse_constant=pytest.fail) == expected


def test_training_does_not_die_of_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    JsonLinesCallback().on_log(SimpleNamespace(output_dir=str(tmp_path)), state_of(1), None, logs={"loss": 1.0})


@pytest.mark.parametrize("callback", [ConsoleCallback, PlainConsoleCallback])
def test_console_shows_the_line_on_the_first_rank_only(callback, capsys):
    for is_main in (True, False):
        callback().on_log(None, state_of(4, is_main), None, logs={"loss": 1.0})
    assert capsys.readouterr().out == "step 4/9 | loss 1.0000\n"
